// What all views share: the data, elements, the state in the address, colours and charts.
const DATA = JSON.parse(document.getElementById("data").textContent);
const METRICS = new Map(DATA.metrics.map((metric) => [metric.name, metric]));
const TOGETHER = "*";
const ROOT = document.documentElement;

/** An element; texts are never read as markup. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "style") for (const [k, v] of Object.entries(value)) element.style.setProperty(k, v);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const at = (id) => document.getElementById(id);
const unique = (values) => [...new Set(values)];
const titleOf = (name) => (name === TOGETHER ? "All metrics" : METRICS.get(name)?.title ?? name);
const JOURNAL = {
  kl: "KL divergence from the base model, mean of the trained steps", clip_fraction: "Clipped share of the objective", reward_std: "Spread of rewards within a group",
  grad_norm: "Norm of the gradient", ratio_deviation: "Mean deviation of a ratio from 1", images_per_s: "Images per second", distillation: "Distillation loss",
};
const words = (name) => name.replaceAll("_", " ");

function digits(metric, value) {
  if (value === null || value === undefined) return "–";
  return value.toFixed(METRICS.get(metric)?.digits ?? 2);
}

// -- the state: #view?key=value, so that every view has a link --

const state = { view: "overview", values: new URLSearchParams() };

function readAddress() {
  const [view, query] = location.hash.slice(1).split("?");
  state.view = at(view)?.matches("[data-section]") ? view : "overview";
  state.values = new URLSearchParams(query ?? "");
}

const get = (key, otherwise = "") => state.values.get(key) ?? otherwise;

/** Change the state, and show the view again; a control that is drawn again keeps the focus. */
function set(changes) {
  const { key, value: pressed } = document.activeElement?.dataset ?? {};
  for (const [key, value] of Object.entries(changes)) {
    if (value === "" || value === null) state.values.delete(key);
    else state.values.set(key, value);
  }
  const query = state.values.toString();
  history.replaceState(null, "", `#${state.view}${query ? `?${query}` : ""}`);
  show();
  if (!key) return;
  const same = [...document.querySelectorAll(`#${state.view} [data-key="${key}"]`)].find((control) => control.dataset.value === pressed);
  same?.focus({ preventScroll: true });
}

const views = {}; // by name: a function that draws the view
let printing = false; // all views are drawn, and images do not wait until they are looked at

function show() {
  for (const section of document.querySelectorAll("[data-section]")) section.hidden = section.id !== state.view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === state.view) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" }); // on narrow screens the tabs scroll
    } else link.removeAttribute("aria-current");
  }
  document.title = `${words(state.view)} – results of the scale ${DATA.scale}`;
  views[state.view]?.();
}

// -- controls --

/** A selection; `options` are values or [value, text]. */
function choice(label, key, options, chosen) {
  const items = options.map((option) => (Array.isArray(option) ? option : [option, words(String(option))]));
  if (items.length < 2) return null;
  const select = h("select", { "data-key": key, onchange: (event) => set({ [key]: event.target.value }) });
  for (const [value, text] of items) select.append(h("option", { value, selected: String(value) === String(chosen) }, text));
  return h("label", {}, label, select);
}

/** Buttons of which one is pressed. */
function buttons(label, key, options, chosen) {
  const items = options.map(([value, text]) =>
    h("button", { type: "button", "data-key": key, "data-value": value, "aria-pressed": String(value === chosen), onclick: () => set({ [key]: value }) }, text));
  return h("div", { class: "field" }, label, h("span", { class: "group" }, items));
}

/** Buttons of which any number is pressed; the state holds those that are, if not the default. */
function chips(label, key, names, chosen) {
  const items = names.map((name) => {
    const on = chosen.includes(name);
    const next = on ? chosen.filter((other) => other !== name) : names.filter((other) => chosen.includes(other) || other === name);
    return h("button", {
      type: "button", class: "key", "data-key": key, "data-value": name, style: { "--c": DATA.systems[name].colour }, "aria-pressed": String(on),
      onclick: () => set({ [key]: next.join(" ") || "none" }),
    }, DATA.systems[name].name);
  });
  return h("details", { class: "field chosen", open: chips.open, style: { "flex-basis": "100%" }, ontoggle: (event) => { chips.open = event.target.open; } },
    h("summary", {}, `${label}: ${chosen.length} of ${names.length}`), h("span", { class: "chips" }, items));
}
chips.open = innerWidth > 720; // and then as the reader leaves it

function copyButton(text, content) {
  const button = h("button", { type: "button" }, text);
  button.addEventListener("click", async () => {
    button.textContent = (await copied(content())) ? "Copied" : "Not allowed here";
    setTimeout(() => { button.textContent = text; }, 1500);
  });
  return button;
}

async function copied(content) {
  try {
    await navigator.clipboard.writeText(content);
    return true;
  } catch { // a page from a file may have no clipboard
    const area = h("textarea", {}, content);
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// -- colours and charts --

const isDark = () => ROOT.dataset.theme === "dark";

/** A system's colour, lighter on a dark ground. */
function colourOf(system) {
  const colour = DATA.systems[system].colour;
  return isDark() ? d3.interpolateLab(colour, "#ffffff")(0.3) : colour;
}

/** A chart with the look of all charts; see Observable Plot. */
function plot(caption, options) {
  const { width = 380, height = 240, ...others } = options;
  const svg = Plot.plot({
    width, height, marginLeft: 48, marginBottom: 36, style: { background: "transparent", fontSize: "12px", fontFamily: "inherit" },
    marginTop: others.y?.label ? 26 : 10, grid: true, className: "chart-of-plot", ariaLabel: caption || [others.y?.label, others.x?.label].filter(Boolean).join(" against "), ...others,
  });
  svg.classList.add("plot");
  svg.setAttribute("role", "img");
  for (const mark of svg.querySelectorAll("g[aria-label]")) mark.removeAttribute("aria-label"); // Plot names groups by their kind
  return h("figure", {}, caption ? h("figcaption", {}, caption) : null, svg);
}

/** Content that scrolls by itself, with the keyboard too. */
const scrolling = (label, content, kind = "") => h("div", { class: `scroll ${kind}`, tabindex: 0, role: "region", "aria-label": label }, content);

/** The width of a chart in an element, which may be narrower than the chart should be. */
const fitting = (id, width) => Math.min(width, at(id).clientWidth || width);

function legend(systems) {
  return h("div", { class: "legend" }, systems.map((system) =>
    h("span", { class: `key ${DATA.systems[system].dash ? "dashed" : ""}`, style: { "--c": DATA.systems[system].colour } }, DATA.systems[system].name)));
}

/** Lines with bands of {system: [[x, value, low, high]]}. */
function bands(points, label, options = {}) {
  const rows = Object.entries(points).flatMap(([system, list]) =>
    list.map(([x, value, low, high]) => ({ system, name: DATA.systems[system].name, x, value, low, high })));
  const known = rows.filter((row) => row.value !== null);
  const colour = (row) => colourOf(row.system);
  return [
    Plot.areaY(known.filter((row) => row.low !== null), { x: "x", y1: "low", y2: "high", z: "system", fill: colour, fillOpacity: 0.1 }),
    ...Object.keys(points).map((system) =>
      Plot.lineY(known.filter((row) => row.system === system), { x: "x", y: "value", stroke: colourOf(system), strokeWidth: 1.8, strokeDasharray: DATA.systems[system].dash || undefined })),
    Plot.dot(known, { x: "x", y: "value", fill: colour, r: 2.2 }),
    Plot.tip(known, Plot.pointer({ x: "x", y: "value", title: (row) => `${row.name}\n${label} ${row.x}\n${row.value}${row.low === null ? "" : `\n95 %: ${row.low} to ${row.high}`}` })),
  ];
}
