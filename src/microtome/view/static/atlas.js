/* The routes: which page an address shows, and moving between pages. */
"use strict";

(function (atlas) {
  const { h, href, Problem, data } = atlas;
  const main = document.getElementById("main");
  let turn = 0; // counts the pages asked for, so that a slow one does not replace a later one
  let shownPath = null;

  /** #/neurons?sort=max -> { path: "/neurons", parts: ["neurons"], params } */
  function parse(hash) {
    const [path, query] = hash.replace(/^#/, "").split(/\?(.*)/s);
    const clean = `/${path.split("/").filter(Boolean).join("/")}`;
    return { path: clean, parts: clean.split("/").filter(Boolean), params: new URLSearchParams(query || "") };
  }

  const busy = (text) => main.replaceChildren(h("p", { class: "note", role: "status" }, text));

  async function listPage(kind, route) {
    const title = kind[0].toUpperCase() + kind.slice(1);
    let options = {};
    let table;
    if (kind === "neurons") {
      const progress = (done, all) =>
        shownPath !== route.path && busy(`Reading the neurons of layer ${done} of ${all} …`);
      const [all, vocab] = await Promise.all([data.allNeurons(progress), data.vocab()]);
      table = all;
      const { manifest, neurons } = await data.model();
      const load = () => data.words(neurons.map(({ layer }) => layer));
      const words = atlas.query.hasWords(table, route.params.get("q") ?? "") ? await load() : null;
      options = { vocab, words, load, length: manifest.text?.length, sort: table.has("max") ? "max" : "address" };
    } else {
      table = (await data.model()).tables[kind];
      const first = table.quantities().find((name) => table.controlOf(name)); // what is shown best first
      if (kind === "heads" && first) options = { sort: table.has("induction") ? "induction" : first };
    }
    return { title, content: [h("h1", { tabindex: -1 }, title), atlas.list({ table, route, ...options })] };
  }

  const unit = (pattern, page) => ({ fits: ({ parts }) => parts.length === 2 && pattern.test(parts.join("/")), page });
  const ROUTES = [
    { fits: ({ path }) => path === "/", page: atlas.overview },
    ...["layers", "heads", "neurons"].map((kind) => ({
      fits: ({ path }) => path === `/${kind}`,
      page: (route) => listPage(kind, route),
    })),
    unit(/^layer\/\d+$/, atlas.layerPage),
    unit(/^head\/\d+\.\d+$/, atlas.headPage),
    unit(/^neuron\/\d+\.\d+$/, atlas.neuronPage),
    ...atlas.moreRoutes,
  ];

  /** What is shown in place of a page that cannot be. */
  function failure(problem) {
    if (!(problem instanceof Problem)) console.error(problem);
    const text = problem instanceof Problem ? problem.message : `This page could not be drawn: ${problem}`;
    const link = (path, label) => h("a", { href: href(path) }, label);
    return {
      title: "Not here",
      content: [
        h("h1", { tabindex: -1 }, "Not here"),
        h("p", { class: "complaint", role: "alert" }, text),
        h(
          "p",
          {},
          "Go to the ",
          link("/", "overview"),
          ", the ",
          link("/layers", "layers"),
          ", the ",
          link("/heads", "heads"),
          " or the ",
          link("/neurons", "neurons"),
          ".",
        ),
      ],
    };
  }

  async function draw(route) {
    try {
      const found = ROUTES.find(({ fits }) => fits(route));
      if (!found) {
        throw new Problem(
          `There is no page "${route.path}". ` +
            "Pages are /, /layers, /heads, /neurons, /groups, /relations, /layer/12, /head/12.3, /neuron/12.431, /group/NAME " +
            "and /relation/NAME.",
        );
      }
      return await found.page(route);
    } catch (problem) {
      return failure(problem);
    }
  }

  const nodes = (content) => [content].flat(Infinity).filter(Boolean);

  /** When the page has been painted; a page that is not seen is never painted, and waits a moment. */
  const painted = () =>
    new Promise((done) => {
      requestAnimationFrame(() => setTimeout(done));
      setTimeout(done, 100);
    });

  /** Draw what a page left for later, part by part, each after the page has been painted; until another page is asked for. */
  async function drawLater(places, own) {
    for (const [place, make] of places) {
      await painted();
      if (own !== turn) return;
      try {
        place.replaceWith(...nodes(await make()));
      } catch (problem) {
        place.replaceWith(...nodes(failure(problem).content.slice(1, 2)));
      }
    }
  }

  /** Show the page that the address names, and keep the reader's place where only its state changed. */
  async function show() {
    const own = ++turn;
    const route = parse(location.hash);
    main.setAttribute("aria-busy", "true");
    const { title, content } = await draw(route);
    if (own !== turn) return;
    const focused = document.activeElement?.id;
    const samePage = route.path === shownPath;
    const places = []; // of parts that are functions, which are called after the first paint
    const first = [];
    for (const part of nodes(content)) {
      if (typeof part !== "function") first.push(part);
      else if (samePage) first.push(await part());
      else {
        places.push([h("div"), part]);
        first.push(places.at(-1)[0]);
      }
    }
    if (own !== turn) return;
    main.replaceChildren(...nodes(first));
    if (!places.length) main.removeAttribute("aria-busy");
    const manifest = (await data.model().catch(() => null))?.manifest;
    const { name } = manifest?.model || { name: "a model" };
    atlas.names.rooms(manifest);
    if (manifest?.thin?.length && !document.querySelector("header .thin")) {
      const few = { class: "thin complaint", href: href("/"), title: manifest.thin.join(" ") };
      document.querySelector("header").append(h("a", few, `thin: ${atlas.plural(manifest.text?.tokens ?? 0, "token")}`));
    }
    document.title = title ? `${title} · ${name}` : `Atlas of ${name}`;
    for (const link of document.querySelectorAll("header nav a")) {
      const [, room] = link.getAttribute("href").split("/");
      const current = room === (route.parts[0] || "") || (route.parts.length === 2 && room === `${route.parts[0]}s`);
      if (current) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    if (samePage) document.getElementById(focused)?.focus({ preventScroll: true });
    else if (shownPath !== null) {
      window.scrollTo(0, 0);
      const follow = /^step-/.test(focused || "") && document.getElementById(focused);
      (follow || main.querySelector("h1"))?.focus({ preventScroll: true });
    }
    shownPath = route.path;
    await drawLater(places, own);
    if (own === turn) main.removeAttribute("aria-busy");
  }

  /* "/" goes to the filter; j and k to the next and previous unit, or page of a list. */
  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName))
      return;
    const target = { "/": "input[type=search]", j: "a[rel=next]", k: "a[rel=prev]" }[event.key];
    const found = target && main.querySelector(target);
    if (!found) return;
    event.preventDefault();
    if (event.key === "/") found.focus();
    else found.click();
  }

  window.addEventListener("hashchange", show);
  document.addEventListener("keydown", press);
  show();
})(window.atlas);
