// Quality for its cost: the ranking at any training budget, time to a target, the Pareto front.
const COSTS = { compute: "Forward passes per image", seconds: "Seconds of training" };

/** The seconds of a system's training that cost `compute` of its `whole`; runs took about the same. */
function secondsOf(system, compute = 1, whole = 1) {
  const known = DATA.runs.filter((run) => run.system === system && run.seconds);
  return known.length ? (compute / whole) * d3.mean(known, (run) => run.seconds) : 0;
}

const short = (value) => d3.format(",.3~r")(value);
const better = (metric) => (metric === TOGETHER || METRICS.get(metric).up ? 1 : -1);
const unitOf = (metric) => (metric === TOGETHER ? "gain, standard deviations" : METRICS.get(metric).unit);

/** A slider whose drawing follows it; the address keeps where it was left. */
function slider(label, key, values, chosen, text, draw) {
  const place = Math.max(0, values.indexOf(chosen));
  const shown = h("b", {}, text(values[place]));
  const input = h("input", {
    type: "range", "data-key": key, min: 0, max: values.length - 1, value: place, "aria-label": label, "aria-valuetext": text(values[place]),
    oninput: (event) => {
      const value = values[event.target.value];
      shown.textContent = text(value);
      event.target.setAttribute("aria-valuetext", text(value));
      draw(value);
    },
    onchange: (event) => set({ [key]: String(values[event.target.value]) }),
  });
  return h("label", {}, h("span", {}, `${label}: `, shown), input);
}

const nearest = (values, wanted, otherwise) => (wanted === "" ? otherwise : d3.least(values, (value) => Math.abs(value - Number(wanted))));

function drawBudget(budget, name) {
  const body = at("budget");
  const metrics = budget === "iterations" ? null : DATA.compute[name];
  if (!metrics) return body.replaceChildren();
  const metric = metrics[get("quality")] ? get("quality") : TOGETHER;
  const points = metrics[metric];
  const cost = COSTS[get("cost")] ? get("cost") : "compute";
  const priced = Object.entries(points).map(([system, list]) => ({
    system, name: DATA.systems[system].name,
    list: list.filter(([, value]) => value !== null).map(([x, value, low, high]) => ({ cost: cost === "compute" ? x : secondsOf(system, x, list.at(-1)[0]), value, low, high })),
  }));
  const chart = h("div", {});
  const controls = [
    choice("Quality", "quality", Object.keys(metrics).map((one) => [one, titleOf(one)]), metric),
    choice("Cost", "cost", Object.entries(COSTS), cost),
  ];
  const parts = { compute: rankingAt, target: timeTo }[budget]({ priced, metric, cost, chart });
  body.replaceChildren(h("h2", {}, parts.title), h("p", { class: "note" }, parts.note), h("div", { class: "controls" }, controls, parts.slider), chart);
}

/** The best systems that a training budget buys: of each, its last kept snapshot within the budget. */
function rankingAt({ priced, metric, cost, chart }) {
  const budgets = unique(priced.flatMap(({ list }) => list.map((point) => point.cost))).filter((x) => x > 0).sort((a, b) => a - b);
  const cheapest = Math.min(...priced.map(({ list }) => list.at(-1).cost));
  const limit = nearest(budgets, get("at"), cheapest);
  const extent = d3.extent(priced.flatMap(({ list }) => list.flatMap((point) => [point.value, point.low ?? point.value, point.high ?? point.value])));
  const draw = (most) => {
    const rows = priced.map(({ system, name, list }) => ({ system, name, ...list.findLast((point) => point.cost <= most) }))
      .sort((a, b) => better(metric) * (b.value - a.value));
    chart.replaceChildren(dotRows(rows, {
      x: { label: `${titleOf(metric)}: ${unitOf(metric)}`, domain: extent, inset: 6 },
      title: (row) => `${row.name}: ${row.value}\n95 %: ${row.low} to ${row.high}\n${row.cost ? `after ${short(row.cost)} ${COSTS[cost].toLowerCase()}` : "no snapshot so early: the base model"}`,
    }));
  };
  draw(limit);
  return {
    title: "At any training budget", slider: slider("Budget", "at", budgets, limit, short, draw),
    note: "Each method's last kept snapshot within the budget, best first, with 95 % intervals. A method that keeps none so early is at its base model.",
  };
}

/** What it costs to reach a quality: the first kept snapshot whose mean is there. */
function timeTo({ priced, metric, cost, chart }) {
  const sign = better(metric);
  const values = priced.flatMap(({ list }) => list.map((point) => point.value));
  const [low, high] = d3.extent(values);
  const start = d3.mean(priced, ({ list }) => list[0].value);
  const targets = d3.range(41).map((i) => Number((low + (i / 40) * (high - low)).toPrecision(3)));
  const best = sign > 0 ? high : low;
  const target = nearest(targets, get("target"), nearest(targets, String(start + 0.5 * (best - start)), targets[0]));
  const draw = (wanted) => {
    const rows = priced.map(({ system, name, list }) => ({ system, name, ...list.find((point) => sign * (point.value - wanted) >= 0) }));
    const reached = rows.filter((row) => row.cost !== undefined).sort((a, b) => a.cost - b.cost);
    const never = rows.filter((row) => row.cost === undefined).map((row) => row.name);
    chart.replaceChildren(
      reached.length ? plot("", {
        width: fitting("budget", 640), height: 44 + 26 * reached.length, marginLeft: nameMargin(reached.map((row) => row.system)), marginRight: 56,
        x: { label: COSTS[cost], domain: [0, d3.max(priced, ({ list }) => list.at(-1).cost)] }, y: { label: null, domain: reached.map((row) => row.name) },
        marks: [
          Plot.barX(reached, { y: "name", x: "cost", fill: (row) => colourOf(row.system), insetTop: 5, insetBottom: 5, tip: true, title: (row) => `${row.name}: ${row.value} after ${short(row.cost)}` }),
          Plot.text(reached, { y: "name", x: "cost", text: (row) => short(row.cost), textAnchor: "start", dx: 5 }),
          Plot.ruleX([0], { strokeOpacity: 0.6 }),
        ],
      }) : h("p", { class: "note" }, "No method reaches this."),
      never.length && reached.length ? h("p", { class: "note" }, `Not reached by ${never.join(", ")}.`) : "",
    );
  };
  draw(target);
  return {
    title: "Time to target", slider: slider("Target", "target", targets, target, short, draw),
    note: `What a method spends until a kept snapshot's mean reaches the target (${unitOf(metric)}). Snapshots are few, so a cost is an upper bound.`,
  };
}

/** Values with intervals, a row per system. */
function dotRows(rows, { x, title }) {
  return plot("", {
    width: fitting("budget", 640), height: 44 + 26 * rows.length, marginLeft: nameMargin(rows.map((row) => row.system)),
    x, y: { label: null, domain: rows.map((row) => row.name) },
    marks: [
      Plot.ruleY(rows.filter((row) => row.low !== null), { y: "name", x1: "low", x2: "high", stroke: (row) => colourOf(row.system), strokeWidth: 2 }),
      Plot.dot(rows, { y: "name", x: "value", r: 4.5, fill: (row) => colourOf(row.system), stroke: "var(--bg)", tip: true, title }),
    ],
  });
}

/** Which system and number of steps is best for its cost, among those within two limits. */
function drawPareto(name) {
  const metrics = DATA.steps[name];
  if (!metrics) return at("pareto").replaceChildren();
  const metric = metrics[get("front")] ? get("front") : Object.keys(metrics)[0];
  const axes = { nfe: "Inference steps", seconds: "Seconds of training" };
  const axis = axes[get("axis")] ? get("axis") : "nfe";
  const rows = Object.entries(metrics[metric]).flatMap(([system, list]) =>
    list.filter(([, value]) => value !== null).map(([nfe, value, low, high]) => ({ system, name: DATA.systems[system].name, nfe, seconds: secondsOf(system), value, low, high })));
  const limits = { nfe: unique(rows.map((row) => row.nfe)).sort((a, b) => a - b), seconds: unique(rows.map((row) => row.seconds)).sort((a, b) => a - b) };
  const limit = { nfe: nearest(limits.nfe, get("most"), limits.nfe.at(-1)), seconds: nearest(limits.seconds, get("longest"), limits.seconds.at(-1)) };
  const sign = better(metric);
  const chart = h("div", {});
  const draw = () => {
    const within = (row) => row.nfe <= limit.nfe && row.seconds <= limit.seconds;
    const front = [];
    for (const row of rows.filter(within).sort((a, b) => a[axis] - b[axis] || sign * (b.value - a.value))) {
      if (!front.length || sign * (row.value - front.at(-1).value) > 0) front.push(row);
    }
    chart.replaceChildren(
      plot("", {
        width: fitting("pareto", 640), height: 320, x: { label: axes[axis], ...(axis === "nfe" ? { ticks: limits.nfe, tickFormat: "d" } : {}), inset: 8 }, y: { label: unitOf(metric), nice: true },
        marks: [
          Plot.line(front, { x: axis, y: "value", curve: "step-after", stroke: "currentColor", strokeOpacity: 0.35, strokeWidth: 3 }),
          Plot.dot(rows, { x: axis, y: "value", r: (row) => (front.includes(row) ? 6 : 3.5), fill: (row) => colourOf(row.system), fillOpacity: (row) => (within(row) ? 1 : 0.15), stroke: (row) => (front.includes(row) ? "currentColor" : "none") }),
          Plot.tip(rows, Plot.pointer({ x: axis, y: "value", title: (row) => `${row.name}, ${row.nfe} steps, ${short(row.seconds)} s of training\n${row.value}${row.low === null ? "" : `\n95 %: ${row.low} to ${row.high}`}` })),
        ],
      }),
      h("p", { class: "note" }, `On the front: ${d3.groups(front, (row) => row.name).map(([one, points]) => `${one} at ${points.map((row) => row.nfe).join(", ")} steps`).join("; ") || "nothing"}.`),
    );
  };
  draw();
  at("pareto").replaceChildren(
    h("h2", {}, "Best for its cost"),
    h("p", { class: "note" }, "The line is the Pareto front of the systems within both limits: nothing that costs less is better. Pale points are beyond a limit."),
    h("div", { class: "controls" },
      choice("Quality", "front", Object.keys(metrics).map((one) => [one, titleOf(one)]), metric),
      choice("Cost", "axis", Object.entries(axes), axis),
      slider("Steps at most", "most", limits.nfe, limit.nfe, String, (value) => { limit.nfe = value; draw(); }),
      slider("Seconds of training at most", "longest", limits.seconds, limit.seconds, short, (value) => { limit.seconds = value; draw(); })),
    legend(Object.keys(metrics[metric])), chart,
  );
}
