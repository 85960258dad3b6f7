"use strict";
// Text from data becomes text nodes and attributes alone, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const several = data.runs.length > 1;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "rect"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function number(value) {
  if (value === null || value === undefined) return "not finite";
  if (value === 0 || Number.isInteger(value)) return String(value);
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6 ? value.toExponential(1) : String(+value.toPrecision(3));
}

const percent = (value) => (value === null ? "not finite" : `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`);
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const swatch = (run) => make("span", { class: `swatch run-${run}`, "aria-hidden": "true" });

// ---- the runs ----

function drawRuns() {
  at("name").textContent = data.runs.map((run) => run.name).join(" and ");
  data.runs.forEach((run, index) => {
    const facts = Object.entries(run.facts).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
    const name = several ? [make("h3", {}, swatch(index), ` ${run.name}`)] : [];
    at("runs").append(make("div", {}, ...name, make("dl", {}, ...facts)));
  });
  at("options-title").textContent = several ? `Options that differ: ${data.options.length}` : "All options";
  at("options").append(
    make("thead", {}, make("tr", {}, ...["option", ...data.runs.map((run) => run.name)].map((name) => make("th", {}, name)))),
    make("tbody", {}, ...data.options.map(([name, values]) =>
      make("tr", {}, make("th", { scope: "row" }, name), ...values.map((value) => make("td", {}, value))))),
  );
}

// ---- figures ----

const steps = data.figures.flatMap((figure) => figure.series.flat().map(([step]) => step));
const span = steps.length ? [Math.min(...steps), Math.max(...steps)] : [0, 0];
const across = (step) => (span[0] === span[1] ? 50 : (100 * (step - span[0])) / (span[1] - span[0]));
const cursors = []; // functions that show an update

function drawFigure(figure) {
  const finite = figure.series.flat().map(([, value]) => value).concat(figure.lines.map((line) => line[2]))
    .filter((value) => value !== null);
  const low = Math.min(...finite), high = Math.max(...finite);
  const up = (value) => (high > low ? 96 - (92 * (value - low)) / (high - low) : 50);
  const svg = make("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  data.runs.forEach((run, index) => {
    for (const step of run.collapses) {
      svg.append(make("line", { class: "collapse", x1: across(step), x2: across(step), y1: 0, y2: 100 }));
    }
    let path = "", drawing = false; // what is not finite is a gap
    for (const [step, value] of figure.series[index]) {
      if (value !== null) path += `${drawing ? "L" : "M"}${across(step)} ${up(value)}`;
      drawing = value !== null;
    }
    svg.append(make("path", { class: `run-${index}`, d: path }));
    if (figure.series[index].length === 1 && path) { // one point is no line
      const [step, value] = figure.series[index][0];
      svg.append(make("path", { class: `run-${index}`, d: `M${across(step) - 4} ${up(value)}h8` }));
    }
  });
  for (const [run, moment, value] of figure.lines) {
    svg.append(make("line", { class: `run-${run} ${moment}`, x1: 0, x2: 100, y1: up(value), y2: up(value) }));
  }
  const cursor = make("line", { class: "cursor", y1: 0, y2: 100 });
  svg.append(cursor);
  const shown = make("span", {});
  const lines = figure.lines.length ? " held-out: dotted before, dashed after" : "";
  const plot = make("div", { class: "plot", click: (event) => {
    const box = svg.getBoundingClientRect();
    at("update").value = span[0] + ((event.clientX - box.left) / box.width) * (span[1] - span[0]);
    showUpdate();
  } }, svg);
  if (finite.length) plot.append(make("span", { class: "high" }, number(high)), make("span", { class: "low" }, number(low)));
  cursors.push((update) => {
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, across(update));
    const last = figure.series.map((points) => points.findLast(([step]) => step <= update));
    shown.replaceChildren(...last.flatMap((point, index) =>
      [several ? swatch(index) : "", point ? ` ${number(point[1])} ` : " – "]));
  });
  return make("figure", { "data-name": figure.name }, make("figcaption", {}, make("b", {}, figure.name), " ", shown, lines), plot);
}

function showUpdate() {
  const update = Math.round(at("update").value);
  at("update-shown").textContent = steps.length ? `${update} of ${span[1]}` : "none is logged yet";
  cursors.forEach((show) => show(update));
}

function filterFigures() {
  const words = at("figure-filter").value.toLowerCase();
  for (const figure of at("figures").children) figure.hidden = !figure.dataset.name.toLowerCase().includes(words);
}

// ---- what is known of a trajectory ----

// A row of figures by its names, and each step's rows by position.
function unpack(sample) {
  const text = (indices, probabilities) => indices.map((index, rank) => [data.texts[index], probabilities[rank]]);
  sample.texts = sample.tokens.map((index) => data.texts[index]);
  sample.last = Math.max(-1, ...sample.reveal) + 1; // the step at which all is revealed
  sample.at = new Map();
  const compared = new Map(); // of each position, the last figures that it was learnt with
  for (const { step, shown, rows } of sample.states) {
    const named = rows.map(([position, chosen, kl, clipped, teacher, ours, student, theirs]) =>
      ({ step, position, chosen, kl, clipped, teacher: text(teacher, ours), student: text(student, theirs) }));
    sample.at.set(step, { shown: new Set(shown), rows: new Map(named.map((row) => [row.position, row])) });
    for (const row of named) if (row.chosen) compared.set(row.position, row);
  }
  sample.at.set(sample.last, { shown: new Set(), rows: compared });
  const rows = [...sample.at.values()].flatMap((state) => [...state.rows.values()]);
  sample.most = Math.max(...rows.map((row) => row.kl ?? 0), 1e-9);
  const kept = sample.states.map(({ step }) => [step, comparedAt(sample, step)]);
  sample.strip = kept.map(([step, rows]) => [step, mean(rows.map((row) => row.kl ?? 0))]);
  sample.kl = mean(kept.flatMap(([, rows]) => rows.map((row) => row.kl ?? 0)));
}

const stateOf = (sample, step) => sample.at.get(step) ?? { shown: new Set(), rows: new Map() };
const comparedAt = (sample, step) => [...stateOf(sample, step).rows.values()].filter((row) => row.chosen);

for (const item of data.items) for (const view of item.views) if (view.sample) unpack(view.sample);

// ---- the list ----

const viewOf = (item, run, moment) => item.views.find((view) => view.run === run && view.moment === moment);
// The two responses that a problem's standing compares.
const pairOf = (item) => several ? [viewOf(item, 0, "after"), viewOf(item, 1, "after")]
  : [viewOf(item, 0, "before"), viewOf(item, 0, "after")];
const klOf = (view) => view?.sample?.kl ?? null;
const latest = (item) => item.views[item.views.length - 1];
const rise = (item) => {
  const [first, second] = pairOf(item).map(klOf);
  return first === null || second === null ? null : second - first;
};

function standing(item) {
  if (item.update) return "update";
  const [first, second] = pairOf(item);
  if (!first || !second) return latest(item).score >= 1 ? "right" : "wrong";
  if (first.score !== second.score) return second.score > first.score ? "gained" : "lost";
  return second.score >= 1 ? "right" : "wrong";
}

const SHOW = {
  "all": () => true,
  "gained": (item) => item.standing === "gained",
  "lost": (item) => item.standing === "lost",
  "right": (item) => item.standing === "right",
  "wrong": (item) => item.standing === "wrong",
  "updates": (item) => item.update,
  "with steps": (item) => item.views.some((view) => view.sample),
};
const rank = (first) => (item) => (item.standing === first ? 1 : 0) + (klOf(latest(item)) !== null ? 0.5 : 0);
const SORT = { // largest first; what has no such figure comes last
  "what matters: lost, gained, KL": (item) => ({ lost: 2, gained: 1 })[item.standing] ?? 0,
  "gained": rank("gained"),
  "lost": rank("lost"),
  "KL of the last": (item) => klOf(latest(item)),
  "rise of KL": rise,
  "tries": (item) => Math.max(...item.views.map((view) => view.tries)),
  "order": () => 0,
};

function listed() {
  const words = at("search").value.toLowerCase(), value = SORT[at("sort").value];
  const found = data.items.filter((item) => SHOW[at("show").value](item) && item.text.includes(words));
  const keyed = found.map((item) => [value(item) ?? -Infinity, klOf(latest(item)) ?? -1, item]);
  if (at("sort").value !== "order") keyed.sort((one, other) => other[0] - one[0] || other[1] - one[1]);
  return keyed.map(([, , item]) => item);
}

function drawList() {
  const items = listed();
  at("count").textContent = `${items.length} of ${data.items.length}`;
  at("items").replaceChildren(...items.map((item) => {
    const figures = item.views.map((view) =>
      `${viewName(view)}: ${view.score >= 1 ? "right" : view.score > 0 ? `graded ${number(view.score)}` : "wrong"}` +
      (view.tries > 1 ? `, ${view.tries} tries` : "") + (klOf(view) === null ? "" : `, KL ${number(klOf(view))}`));
    item.button = make("button", { type: "button", click: () => select(item) },
      make("span", { class: item.standing }, item.standing), make("span", {}, item.title),
      make("span", { class: "excerpt" }, item.prompt.replaceAll("\n", " ").slice(0, 120)),
      make("span", { class: "figure" }, figures.join(" · ") + (item.views.some((view) => view.sample) ? " · steps" : "")));
    return make("li", {}, item.button);
  }));
  markCurrent();
}

function markCurrent() {
  for (const item of data.items) {
    if (item === current) item.button?.setAttribute("aria-current", "true");
    else item.button?.removeAttribute("aria-current");
  }
}

const viewName = (view) => (view.moment === "update" ? "as it was learnt" : view.moment) +
  (several ? ` (${data.runs[view.run].name})` : "");

// ---- one trajectory ----

let current = null, step = 0, position = 0, panels = [], timer = 0;

function select(item) {
  current = item;
  markCurrent();
  item.button?.scrollIntoView({ block: "nearest" });
  at("item-title").textContent = `${item.title[0].toUpperCase()}${item.title.slice(1)}`;
  at("prompt").textContent = item.prompt;
  panels = item.views.map(panelOf);
  at("views").replaceChildren(...panels.map((panel) => panel.node));
  const samples = item.views.filter((view) => view.sample).map((view) => view.sample);
  at("stepper").hidden = at("legend").hidden = !samples.length;
  at("step").max = Math.max(0, ...samples.map((sample) => sample.last));
  const most = samples.flatMap((sample) => sample.strip).sort((one, other) => other[1] - one[1])[0];
  position = 0;
  go(most ? most[0] : 0); // where the two sides are furthest apart
  const row = samples.length ? comparedAt(samples.find((sample) => sample.strip.includes(most)) ?? samples[0], step)[0] : null;
  if (row) choose(row.position);
}

function panelOf(view, index) {
  const parts = [make("h3", {}, several ? swatch(view.run) : "", ` ${viewName(view)}`),
    make("p", { class: "soft" }, `grade ${number(view.score)}${view.tries > 1 ? `, of ${view.tries} tries` : ""}`)];
  const response = make("pre", { tabindex: "0", role: "region", "aria-label": `Response, ${viewName(view)}` }, view.response);
  if (!view.sample) {
    return { node: make("div", { class: "view" }, ...parts, response, make("p", { class: "soft" }, "Its steps were not kept.")),
      draw: () => {} };
  }
  const sample = view.sample, { block } = sample;
  const cells = sample.texts.map((text, place) => make("span", { id: `cell-${index}-${place}`, role: "option",
    click: () => choose(place) }));
  const tokens = make("div", { class: "tokens", role: "listbox", tabindex: "0", keydown: moveInTokens,
    "aria-label": `Tokens, ${viewName(view)}` }, ...cells);
  const strip = make("svg", { class: "strip", "aria-hidden": "true", preserveAspectRatio: "none",
    viewBox: `0 0 ${sample.last + 1} 1`, click: (event) => {
      const box = strip.getBoundingClientRect();
      go(Math.floor(((event.clientX - box.left) / box.width) * (sample.last + 1)));
    } });
  const highest = Math.max(...sample.strip.map(([, kl]) => kl ?? 0), 1e-9);
  const bars = sample.strip.map(([number, kl]) => [number, make("rect",
    { x: number + 0.1, width: 0.8, y: 1 - Math.max(0.02, (kl ?? 0) / highest), height: 1 })]);
  strip.append(...bars.map(([, bar]) => bar));
  const said = make("p", {}), figures = make("div", { "aria-live": "polite" });

  function draw() {
    const here = Math.min(step, sample.last), { shown, rows } = stateOf(sample, here);
    cells.forEach((cell, place) => {
      const when = sample.reveal[place], known = when >= 0 && when < here, now = when === here, row = rows.get(place);
      const kind = when < 0 ? "never" : known ? "known" : now ? "new" : shown.has(place) ? "shown" : "masked";
      const text = known || now || shown.has(place) ? visible(sample.texts[place]) : when < 0 ? " " : "·";
      const starts = place && sample.reveal.length > block && (place + sample.lead) % block === 0;
      cell.className = `cell ${kind}${now && shown.has(place) ? " shown" : ""}${row?.chosen ? " compared" : ""}` +
        (starts ? " block-start" : "");
      cell.textContent = text || " ";
      cell.style.setProperty("--kl", row ? clamp((row.kl ?? sample.most) / sample.most, 0, 1) : 0);
      cell.setAttribute("aria-selected", String(place === position));
      cell.setAttribute("aria-label", `${place}: ${WORDS[kind]}${kind === "masked" || kind === "never" ? "" : `, ${text}`}` +
        (row ? `, KL ${number(row.kl)}` : ""));
    });
    const selected = cells[clamp(position, 0, cells.length - 1)];
    if (selected) tokens.setAttribute("aria-activedescendant", selected.id);
    for (const [number, bar] of bars) bar.setAttribute("class", number === here ? "here" : "");
    const rowsOfK = comparedAt(sample, here);
    said.textContent = here === sample.last ? "All is revealed; figures are those of the step that each was compared in."
      : !sample.at.has(here) ? "No figures are kept of this step: it is not trained on."
      : rowsOfK.length ? `Mean KL over K ${number(mean(rowsOfK.map((row) => row.kl ?? 0)))}, ` +
        `clipped ${percent(mean(rowsOfK.map((row) => row.clipped ?? 0)))} of entries.`
      : "Nothing is compared in this step.";
    figures.replaceChildren(...figuresOf(rows.get(position)));
  }

  if (bars.length) parts.push(make("p", { class: "soft" }, "Mean KL over K, by step:"), strip, said);
  parts.push(tokens, figures, make("details", {}, make("summary", {}, "Response"), response));
  return { node: make("div", { class: "view" }, ...parts), draw };
}

const WORDS = { never: "never decoded", known: "revealed earlier", new: "revealed in this step",
  shown: "shown to the teacher", masked: "masked" };

function figuresOf(row) {
  if (!row) return [make("p", { class: "soft" }, `Position ${position}: no figures at this step.`)];
  const side = (name, [text, probability]) => make("td", { class: name }, `${visible(text)} ${percent(probability)}`,
    make("span", { class: "bar", style: `--p: ${clamp(probability ?? 0, 0, 1)}` }));
  const lines = row.student.map((entry, index) => make("tr", {}, side("student", entry), side("teacher", row.teacher[index])));
  return [make("p", {}, `Position ${row.position}, step ${row.step}: KL ${number(row.kl)}, ` +
      `clipped ${percent(row.clipped)} of entries${row.chosen ? "" : "; not compared"}.`),
    make("table", { class: "top" }, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "student"),
      make("th", { scope: "col" }, "teacher"))), make("tbody", {}, ...lines))];
}

function go(to) {
  step = clamp(Math.round(to), 0, Number(at("step").max));
  at("step").value = step;
  at("step-shown").textContent = `${step} of ${at("step").max}`;
  panels.forEach((panel) => panel.draw());
}

function choose(place) {
  position = place;
  panels.forEach((panel) => panel.draw());
}

function moveInTokens(event) {
  const length = event.currentTarget.children.length;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8, Home: -length, End: length };
  if (!(event.key in moves)) return;
  event.preventDefault();
  choose(clamp(position + moves[event.key], 0, length - 1));
  event.currentTarget.children[position].scrollIntoView({ block: "nearest" });
}

function play() {
  const on = !timer;
  clearInterval(timer);
  timer = on ? setInterval(() => (step < Number(at("step").max) ? go(step + 1) : play()), 400) : 0;
  if (on && step >= Number(at("step").max)) go(0);
  at("play").setAttribute("aria-pressed", String(on));
}

function neighbour(by) {
  const items = listed(), index = items.indexOf(current);
  if (items.length) select(items[clamp(index < 0 ? 0 : index + by, 0, items.length - 1)]);
}

const KEYS = { ",": () => go(step - 1), ".": () => go(step + 1), n: () => neighbour(1), p: () => neighbour(-1) };

// ---- all of it ----

function start() {
  drawRuns();
  [at("update").min, at("update").max] = span;
  at("update").value = span[1];
  at("figures").append(...data.figures.map(drawFigure));
  showUpdate();
  for (const item of data.items) {
    item.standing = standing(item);
    item.text = [item.title, item.prompt, ...item.views.map((view) => view.response)].join("\n").toLowerCase();
  }
  at("pair").textContent = several
    ? `Gained and lost: right after training in ${data.runs[1].name} alone, or in ${data.runs[0].name} alone.`
    : "Gained and lost: a better or a worse grade after training than before.";
  for (const [id, choices] of [["show", SHOW], ["sort", SORT]]) {
    at(id).append(...Object.keys(choices).map((name) => make("option", {}, name)));
    at(id).addEventListener("change", drawList);
  }
  at("search").addEventListener("input", drawList);
  at("figure-filter").addEventListener("input", filterFigures);
  at("update").addEventListener("input", showUpdate);
  at("step").addEventListener("input", () => go(at("step").value));
  at("back").addEventListener("click", KEYS[","]);
  at("forth").addEventListener("click", KEYS["."]);
  at("play").addEventListener("click", play);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=search], select") || event.ctrlKey || event.metaKey || event.altKey;
    if (!typing && event.key in KEYS) KEYS[event.key]();
  });
  drawList();
  at("item-title").textContent = "No response is kept yet";
  at("stepper").hidden = at("legend").hidden = true;
  neighbour(0);
}

start();
