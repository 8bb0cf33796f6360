"""Small relations between single words, by hand: what heads are asked for in `head_functions`."""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase

SERIES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "numbers": "one two three four five six seven eight nine ten eleven twelve",
        "digits": "0 1 2 3 4 5 6 7 8 9",
        "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
        "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "months": "January February March April May June July August September October November December",
        "letters": " ".join(ascii_uppercase),
        "small letters": " ".join(ascii_lowercase),
    }.items()
}
"""Series in which a word has a successor."""

RELATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    name: tuple((one, other) for one, _, other in (pair.partition(":") for pair in pairs.split()))
    for name, pairs in {
        "casing": """
            the:The this:This that:That what:What when:When where:Where who:Who why:Why how:How after:After
            before:Before while:While since:Since though:Though because:Because first:First last:Last new:New old:Old
            many:Many most:Most some:Some each:Each every:Every people:People world:World time:Time life:Life work:Work
            day:Day""",
        "plural": """
            dog:dogs cat:cats car:cars house:houses book:books tree:trees river:rivers king:kings friend:friends
            door:doors year:years month:months week:weeks child:children man:men woman:women person:people foot:feet
            tooth:teeth city:cities country:countries story:stories body:bodies family:families letter:letters
            number:numbers school:schools teacher:teachers student:students game:games song:songs word:words""",
        "past": """
            go:went see:saw come:came take:took give:gave make:made find:found think:thought tell:told know:knew
            say:said get:got become:became begin:began write:wrote speak:spoke run:ran fall:fell hold:held keep:kept
            leave:left feel:felt bring:brought buy:bought build:built send:sent spend:spent lose:lost eat:ate
            win:won""",
        "comparative": """
            large:larger small:smaller high:higher low:lower long:longer short:shorter strong:stronger weak:weaker
            old:older young:younger new:newer fast:faster slow:slower deep:deeper wide:wider hard:harder soft:softer
            warm:warmer cold:colder hot:hotter rich:richer poor:poorer easy:easier big:bigger great:greater late:later
            early:earlier close:closer light:lighter heavy:heavier good:better bad:worse""",
        "antonym": """
            large:small high:low long:short strong:weak old:young fast:slow deep:shallow wide:narrow hard:soft
            hot:cold rich:poor easy:difficult early:late good:bad light:dark open:closed full:empty left:right
            true:false male:female positive:negative internal:external public:private maximum:minimum
            increase:decrease love:hate war:peace life:death day:night north:south east:west black:white""",
        "capital": """
            France:Paris Italy:Rome Spain:Madrid Germany:Berlin England:London Russia:Moscow China:Beijing Japan:Tokyo
            Egypt:Cairo Greece:Athens Austria:Vienna Poland:Warsaw Ireland:Dublin Portugal:Lisbon Cuba:Havana Peru:Lima
            Iran:Tehran Iraq:Baghdad Turkey:Ankara Israel:Jerusalem Canada:Ottawa Australia:Canberra Sweden:Stockholm
            Norway:Oslo Denmark:Copenhagen Finland:Helsinki Hungary:Budapest Belgium:Brussels Kenya:Nairobi
            Lebanon:Beirut""",
    }.items()
}
"""Pairs of words by relation; `copying` and the successors come besides."""

TEMPLATES: dict[str, str] = {
    "casing": 'With a capital letter "{}" is written',
    "plural": "There was one {}, and now there are two",
    "past": "Today they {}; yesterday they",
    "comparative": "The first one is {}, the second one is even",
    "antonym": "The opposite of {} is",
    "capital": "The capital of {} is the city of",
}
"""By relation, a text with a place for the source that the target follows."""
