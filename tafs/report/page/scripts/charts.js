// Charts of the overview and of the damage that training does.
views.overview = () => {
  const tables = Object.entries(DATA.compute);
  const chart = at("compute-chart");
  if (!tables.length) return chart.replaceChildren(h("p", { class: "note" }, "No table of this scale compares methods at equal training compute."));
  const [[, metrics]] = tables;
  const metric = metrics[get("metric")] ? get("metric") : TOGETHER;
  const points = metrics[metric];
  const label = metric === TOGETHER ? "Gain, standard deviations" : METRICS.get(metric).unit;
  const whole = Math.min(...Object.values(points).map((list) => list.at(-1)[0]).filter((x) => x > 0));
  chart.replaceChildren(
    h("p", { class: "note" }, "Compute: forward passes of the network per image of an iteration, times iterations; a pass with gradients counts three. The vertical line is the cheapest whole training. Bands are 95 % intervals."),
    h("div", { class: "controls" }, choice("Quality", "metric", Object.keys(metrics).map((one) => [one, titleOf(one)]), metric)),
    legend(Object.keys(points)),
    plot("", {
      width: fitting("compute-chart", 1100), height: 340,
      x: { type: "symlog", constant: whole / 4, label: "Training compute (forward passes per image)", ticks: [0, whole / 4, whole, 4 * whole], tickFormat: "d", insetRight: 6 },
      y: { label, domain: d3.extent(Object.values(points).flatMap((list) => [...list.map((point) => point[1]), ...list.at(-1).slice(2)]).filter((value) => value !== null)), nice: true },
      clip: true,
      marks: [
        metric === TOGETHER ? Plot.ruleY([0], { stroke: "currentColor", strokeOpacity: 0.4 }) : null,
        Plot.ruleX([whole], { stroke: "currentColor", strokeOpacity: 0.35, strokeDasharray: "3 3" }),
        ...bands(points, "compute"),
      ],
    }),
  );
};

views.damage = () => {
  const names = Object.keys(DATA.gains);
  const body = at("damage-body");
  const parts = [];
  if (names.length) {
    const name = names.includes(get("table")) ? get("table") : names[0];
    parts.push(h("div", { class: "controls" }, choice("Table", "table", names.map((one) => [one, DATA.tables[one].title]), name)), ...gainCharts(DATA.gains[name]), ...diversityCharts(DATA.diversity[name]));
  } else parts.push(h("p", { class: "note" }, "No table of this scale separates trained rewards from held-out metrics."));
  parts.push(...trainingCharts());
  body.replaceChildren(...parts);
};

/** The width of systems' names on an axis. */
const nameMargin = (systems) => 8 + 7 * Math.min(24, Math.max(...systems.map((system) => DATA.systems[system].name.length)));

function gainCharts(gains) {
  const systems = Object.keys(gains.systems);
  const seeds = systems.flatMap((system) => gains.systems[system].seeds.map(([x, y]) => ({ system, x, y })));
  const means = systems.map((system) => ({ system, x: gains.systems[system].mean[0], y: gains.systems[system].mean[1], name: DATA.systems[system].name }));
  const known = [...seeds, ...means].filter((row) => row.x !== null && row.y !== null);
  if (!known.length) return [h("p", { class: "note" }, "No gains: the base model's scores do not vary over the prompts.")];
  const titles = (metrics) => metrics.map(titleOf).join(", ");
  const scatter = plot("Trained against held out", {
    width: fitting("damage-body", 560), height: 380, inset: 8,
    x: { label: "Gain on trained rewards", nice: true }, y: { label: "Gain on held-out metrics", nice: true },
    marks: [
      Plot.ruleX([0], { strokeOpacity: 0.35 }), Plot.ruleY([0], { strokeOpacity: 0.35 }),
      Plot.line(d3.extent(known.flatMap((row) => [row.x, row.y])).map((value) => ({ x: value, y: value })), { x: "x", y: "y", strokeOpacity: 0.5, strokeDasharray: "2 3" }),
      Plot.dot(seeds.filter((row) => row.x !== null), { x: "x", y: "y", fill: (row) => colourOf(row.system), r: 2.5, fillOpacity: 0.6 }),
      Plot.dot(means.filter((row) => row.x !== null), { x: "x", y: "y", fill: (row) => colourOf(row.system), r: 6, stroke: "var(--bg)" }),
      Plot.tip(means.filter((row) => row.x !== null), Plot.pointer({ x: "x", y: "y", title: (row) => `${row.name}\ntrained ${row.x}\nheld out ${row.y}` })),
    ],
  });
  const order = [...gains.trained, ...gains.others];
  const cells = systems.flatMap((system) => order.map((metric) => {
    const [value, low, high] = gains.systems[system].metrics[metric];
    return { name: DATA.systems[system].name, system, metric, value, low, high };
  })).filter((cell) => cell.value !== null);
  const extent = d3.extent(cells.flatMap((cell) => [cell.low, cell.high, 0]).filter((x) => x !== null));
  const panels = order.map((metric) => plot(`${titleOf(metric)}${gains.trained.includes(metric) ? " (trained)" : " (held out)"}`, {
    width: 360, height: 30 + 26 * systems.length, marginLeft: nameMargin(systems), marginBottom: 30,
    x: { label: null, domain: extent, inset: 6 }, y: { label: null, domain: systems.map((system) => DATA.systems[system].name) },
    marks: [
      Plot.ruleX([0], { strokeOpacity: 0.6 }),
      Plot.ruleY(cells.filter((cell) => cell.metric === metric && cell.low !== null), { y: "name", x1: "low", x2: "high", stroke: (cell) => colourOf(cell.system), strokeWidth: 2 }),
      Plot.dot(cells.filter((cell) => cell.metric === metric), { y: "name", x: "value", r: 4, fill: (cell) => colourOf(cell.system), tip: true, title: (cell) => `${cell.name}: ${cell.value}\n95 %: ${cell.low} to ${cell.high}` }),
    ],
  }));
  return [
    h("p", { class: "note" }, `Gains on the base model at the same few steps, in standard deviations of its prompts. Trained: ${titles(gains.trained)}. Held out: ${titles(gains.others)}. Small dots are seeds; below the dotted diagonal a method gains more on what it was trained on.`),
    legend(systems), scatter,
    h("h2", {}, "Gain on each metric"), h("p", { class: "note" }, "With 95 % intervals; left of the line, training made the metric worse."),
    h("div", { class: "charts" }, panels),
  ];
}

/** The Vendi score and statistics of the pixels. */
function diversityCharts({ nfe, images, features, charts: [vendi, ...panel] }) {
  const wide = fitting("damage-body", 560);
  return [
    h("h2", {}, "Diversity"),
    h("p", { class: "note" }, `Vendi score: the effective number of different images among the ${images} kept ones, one of each prompt, at ${nfe} steps. It is 1 if all are alike and ${images} if no two are; features: ${features}. Small dots are seeds, bars 95 % intervals over seeds. Left of the dashed line, images of different prompts are more alike than those of the base model.`),
    systemsChart("", vendi, wide),
    h("h2", {}, "Statistics of the pixels"),
    h("p", { class: "note" }, "Means over the same images. Neither direction is better: far from the base model's dashed line, training has changed more than what the prompts ask for."),
    h("div", { class: "charts" }, panel.map((chart) => systemsChart(chart.title, chart, 360))),
  ];
}

/** A number of each system, seed by seed; the dashed line is the base model's. */
function systemsChart(heading, { title, systems }, width) {
  const rows = Object.entries(systems).map(([system, { mean: [value, low, high] }]) => ({ system, name: DATA.systems[system].name, value, low, high }));
  const seeds = Object.entries(systems).flatMap(([system, found]) => found.seeds.map((value) => ({ system, name: DATA.systems[system].name, value })));
  const bases = rows.filter((row) => !DATA.systems[row.system].trained);
  return plot(heading, {
    width, height: 44 + 26 * rows.length, marginLeft: nameMargin(Object.keys(systems)),
    x: { label: heading ? null : title, nice: true }, y: { label: null, domain: rows.map((row) => row.name) },
    marks: [
      Plot.ruleX(bases, { x: "value", strokeOpacity: 0.6, strokeDasharray: "3 3" }),
      Plot.ruleY(rows.filter((row) => row.low !== null), { y: "name", x1: "low", x2: "high", stroke: (row) => colourOf(row.system), strokeWidth: 2 }),
      Plot.dot(seeds, { y: "name", x: "value", r: 2.5, fill: (row) => colourOf(row.system), fillOpacity: 0.6 }),
      Plot.dot(rows, { y: "name", x: "value", r: 4.5, fill: (row) => colourOf(row.system), stroke: "var(--bg)", tip: true, title: (row) => `${row.name}: ${row.value}${row.low === null ? "" : `\n95 %: ${row.low} to ${row.high}`}` }),
    ],
  });
}

/** Signs of damage over training, from the journals. */
function trainingCharts() {
  const shown = ["kl", "reward_std", "clip_fraction", "grad_norm"];
  const chosen = mainSystems(Object.keys(DATA.systems).filter((system) => DATA.systems[system].trained));
  const drawn = DATA.runs.filter((run) => chosen.includes(run.system));
  const figures = shown.flatMap((key) => {
    const runs = drawn.filter((run) => run.curves[key]);
    return runs.length ? [curveChart(JOURNAL[key], runs, key)] : [];
  });
  if (!figures.length) return [];
  return [h("h2", {}, "During training"), h("p", { class: "note" }, "Thick lines are means over seeds, thin ones are runs; the view of runs has the other systems."), legend(chosen), h("div", { class: "charts" }, figures)];
}

/** A number of the journals against iterations: a thin line per run, and a thick one of each system's mean. */
function curveChart(title, runs, key, options = {}) {
  const rows = runs.flatMap((run) => run.curves[key].map((value, i) => ({ run: run.name, system: run.system, seed: run.seed, x: run.curves.iteration[i], value }))).filter((row) => row.value !== null);
  return plot(title, {
    x: { label: "Iteration" }, y: { label: null, nice: true },
    marks: [
      Plot.lineY(rows, { x: "x", y: "value", z: "run", stroke: (row) => colourOf(row.system), strokeWidth: 0.8, strokeOpacity: 0.35 }),
      Plot.lineY(rows, Plot.groupX({ y: "mean" }, { x: "x", y: "value", z: "system", stroke: (row) => colourOf(row.system), strokeWidth: 2 })),
      Plot.tip(rows, Plot.pointer({ x: "x", y: "value", title: (row) => `${DATA.systems[row.system].name}, seed ${row.seed}\niteration ${row.x}\n${row.value}` })),
    ],
    ...options,
  });
}
