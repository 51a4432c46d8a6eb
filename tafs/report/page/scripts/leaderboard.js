// The leaderboard: choose a table, sort it, filter it, copy it; who beats whom.
const RESULTS = [...document.querySelectorAll("table.results")];

/** Sort a table's rows by a column; rows without a value come last. */
function sortTable(table, key, descending) {
  const heads = [...table.tHead.rows[0].cells];
  const place = heads.findIndex((head) => head.dataset.sort === key);
  if (place < 0) return;
  table.classList.add("sorted"); // rules between groups of rows mean nothing in another order
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[place].setAttribute("aria-sort", descending ? "descending" : "ascending");
  const value = (row) => {
    const cell = row.cells[place];
    if (key === "name") return cell.textContent.trim().toLowerCase();
    const text = cell.dataset.value ?? cell.textContent;
    return text.trim() === "" ? null : Number(text);
  };
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

for (const table of RESULTS) {
  for (const head of table.tHead.rows[0].cells) {
    head.tabIndex = 0;
    const sort = () => {
      const before = head.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : head.dataset.sort !== "name";
      if (table.id === "headline") sortTable(table, head.dataset.sort, descending);
      else set({ sort: head.dataset.sort, order: descending ? "" : "up" });
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }
}

const OF_KIND = (kind) => Object.keys(DATA.tables).filter((name) => DATA.tables[name].kind === kind);
const BUDGETS = { iterations: "Equal iterations", compute: "Equal compute", target: "Time to target" };

views.leaderboard = () => {
  const budget = get("budget", "iterations");
  const known = budget !== "iterations" ? OF_KIND("compute") : Object.keys(DATA.tables).filter((name) => DATA.tables[name].kind !== "compute");
  const first = known.find((name) => DATA.gains[name]) ?? known[0];
  const chosen = known.includes(get("table")) ? get("table") : first;
  for (const sheet of document.querySelectorAll(".sheet")) sheet.hidden = sheet.dataset.sheet !== chosen || budget === "target";
  const table = RESULTS.find((one) => one.dataset.table === chosen && one.id !== "headline");
  const rows = [...table.tBodies[0].rows];
  const filters = ["task", "model", "nfe"];
  for (const row of rows) row.hidden = filters.some((key) => get(key) && (row.dataset[key] || "untrained") !== get(key));
  const domains = DATA.gains[chosen] ? { trained: DATA.gains[chosen].others, others: DATA.gains[chosen].trained } : {};
  const without = domains[get("domain")] ?? [];
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    for (const row of table.rows) row.cells[place].hidden = without.includes(head.dataset.sort);
  });
  if (get("sort")) sortTable(table, get("sort"), get("order") !== "up");
  const values = (key) => unique(rows.map((row) => row.dataset[key] || "untrained")).sort((a, b) => a - b || a.localeCompare(b));
  const titles = { task: "Task", model: "Model", nfe: "Steps" };
  const { files } = DATA.tables[chosen];
  at("leaderboard-controls").replaceChildren(...[
    OF_KIND("compute").length ? buttons("Training budget", "budget", Object.entries(BUDGETS), budget) : null,
    choice("Table", "table", known.map((name) => [name, DATA.tables[name].title]), chosen),
    ...(budget === "target" ? [] : filters).map((key) => choice(titles[key], key, [["", "all"], ...values(key).map((value) => [value, words(value)])], get(key))),
    choice("Metrics", "domain", Object.keys(domains).length ? [["", "all"], ["trained", "trained on"], ["others", "held out"]] : [], get("domain")),
    h("div", { class: "field" }, "Copy", h("span", { class: "group" },
      files.tex && budget !== "target" ? copyButton("LaTeX", () => files.tex) : null,
      files.csv && budget !== "target" ? copyButton("CSV", () => files.csv) : null,
      copyButton("Link", () => location.href))),
  ].filter(Boolean));
  drawBudget(budget, chosen);
  drawMatrix(budget === "target" ? "" : chosen);
  drawSteps(chosen);
  drawPareto(chosen);
};

/** Who beats whom: the share of prompts that a row improves over a column. */
function drawMatrix(name) {
  const matrix = DATA.matrices[name];
  if (!matrix) return at("matrix").replaceChildren();
  const metric = matrix.wins[get("metric")] ? get("metric") : TOGETHER;
  const wins = new Map();
  for (const [i, j, value, low, high, p] of matrix.wins[metric]) {
    wins.set(`${i} ${j}`, { value, low, high, p });
    wins.set(`${j} ${i}`, { value: 1 - value, low: 1 - high, high: 1 - low, p });
  }
  const scale = isDark()
    ? d3.scaleLinear([0, 0.5, 1], ["#9a4a10", "#26282e", "#1d6596"]).interpolate(d3.interpolateLab)
    : d3.scaleLinear([0, 0.5, 1], ["#e99a63", "#f2f2ee", "#7db6dd"]).interpolate(d3.interpolateLab);
  const cell = (i, j) => {
    const found = wins.get(`${i} ${j}`);
    if (!found || found.value === null) return h("td", {});
    const sure = found.p <= 0.05 && matrix.decides[i] && matrix.decides[j];
    const range = found.low === null ? "" : `, 95 % interval ${(100 * found.low).toFixed(0)} to ${(100 * found.high).toFixed(0)} %`;
    const doubt = matrix.decides[i] && matrix.decides[j] ? "" : "; one seed decides nothing";
    return h("td", {
      class: sure ? "sure" : null, style: { background: scale(found.value) },
      title: `${matrix.rows[i]} beats ${matrix.rows[j]} on ${(100 * found.value).toFixed(1)} % of prompts${range}; corrected p = ${found.p}${doubt}`,
    }, (100 * found.value).toFixed(0));
  };
  const head = h("thead", {}, h("tr", {}, h("td", {}), matrix.rows.map((row) => h("th", { scope: "col" }, row))));
  const body = h("tbody", {}, matrix.rows.map((row, i) => h("tr", {}, h("th", { scope: "row" }, row), matrix.rows.map((_, j) => cell(i, j)))));
  at("matrix").replaceChildren(
    h("h2", {}, "Who beats whom"),
    h("p", { class: "note" }, "Percent of prompts on which the row's images score higher than the column's, ties counting half. Framed: the difference from 50 % is significant at 5 % after Holm's correction for all pairs, and neither system was trained with one seed alone."),
    h("div", { class: "controls" }, choice("Metric", "metric", Object.keys(matrix.wins).map((one) => [one, titleOf(one)]), metric)),
    scrolling("Who beats whom", h("table", { class: "matrix" }, head, body)),
  );
}

function drawSteps(name) {
  const metrics = DATA.steps[name];
  if (!metrics) return at("steps").replaceChildren();
  const systems = Object.keys(Object.values(metrics)[0]);
  at("steps").replaceChildren(
    h("h2", {}, "Against inference steps"),
    h("p", { class: "note" }, "Means over seeds with 95 % intervals; every model with its best sampler at each number of steps."),
    legend(systems),
    h("div", { class: "charts" }, Object.entries(metrics).map(([metric, points]) =>
      plot(titleOf(metric), { x: { label: "Steps", ticks: points[systems[0]].map(([x]) => x), tickFormat: "d" }, y: { label: METRICS.get(metric).unit }, marks: bands(points, "steps") }))),
  );
}
