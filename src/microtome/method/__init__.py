"""What a declaration becomes: checks, settings, passes over a text, labelled results, commands, documentation.

A method is declared once, by one of three decorators, and everything that surrounds it follows:

    @measure     of a model: its layers, heads, neurons; any set of measures runs in as few passes as their inputs allow
    @question    about prompts: who wrote an answer, what carries it, what it needs
    @change      of a model: edits that can be run under, saved and taken back
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from microtome.later import names_of

if TYPE_CHECKING:
    from microtome.method._arguments import Parameter as Parameter
    from microtome.method._arguments import choices_of as choices_of
    from microtome.method._change import Change as Change
    from microtome.method._change import change as change
    from microtome.method._compare import MEASURES as MEASURES
    from microtome.method._compare import compare as compare
    from microtome.method._compare import moved_most as moved_most
    from microtome.method._declare import DIMS as DIMS
    from microtome.method._declare import Argument as Argument
    from microtome.method._declare import Column as Column
    from microtome.method._declare import Method as Method
    from microtome.method._declare import Source as Source
    from microtome.method._look import RepeatedTokens as RepeatedTokens
    from microtome.method._look import Text as Text
    from microtome.method._look import Weights as Weights
    from microtome.method._measure import Measure as Measure
    from microtome.method._measure import measure as measure
    from microtome.method._needs import refused as refused
    from microtome.method._pass import Bound as Bound
    from microtome.method._pass import Pass as Pass
    from microtome.method._prompts import AnswerToken as AnswerToken
    from microtome.method._prompts import PromptText as PromptText
    from microtome.method._prompts import Span as Span
    from microtome.method._prompts import span_from_text as span_from_text
    from microtome.method._question import Found as Found
    from microtome.method._question import Question as Question
    from microtome.method._question import question as question
    from microtome.method._question import run_sweep as run_sweep
    from microtome.method._registry import Declared as Declared
    from microtome.method._registry import Methods as Methods
    from microtome.method._registry import declared as declared
    from microtome.method._registry import forget as forget
    from microtome.method._registry import index as index
    from microtome.method._registry import methods as methods
    from microtome.method._registry import register as register
    from microtome.method._result import Result as Result
    from microtome.method._sketch import Sketch as Sketch
    from microtome.method._sketch import from_source as from_source
    from microtome.method._sketch import sketch as sketch
    from microtome.method._statistic import Kept as Kept
    from microtome.method._statistic import Seen as Seen
    from microtome.method._statistic import Statistic as Statistic
    from microtome.method._texts import Batches as Batches
    from microtome.method._texts import by_group as by_group
    from microtome.method._texts import corpus_of as corpus_of
else:
    __getattr__, __dir__ = names_of(__name__)
