// The gallery: the same prompt and start noise across systems; wins and losses; blind votes.
const loader = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    load(target);
    loader.unobserve(target);
  }
}, { rootMargin: "300px" });

const load = (cell) => { cell.style.backgroundImage = `url("${cell.dataset.sheet}")`; };

/** A cell of a sheet, loaded when it comes into view. */
function cellOf(sheet, columns, count, place, caption, title) {
  const rows = Math.ceil(count / columns);
  const share = (index, length) => (length > 1 ? `${(100 * index) / (length - 1)}%` : "0");
  const cell = h("div", {
    class: "cell", role: "img", "aria-label": caption, title: title || caption, "data-sheet": `images/${encodeURIComponent(`${sheet}.webp`)}`,
    style: { "background-size": `${100 * columns}% ${100 * rows}%`, "background-position": `${share(place % columns, columns)} ${share(Math.floor(place / columns), rows)}` },
  });
  if (printing) load(cell);
  else loader.observe(cell);
  return cell;
}

/** A prompt's image of a run. */
function image(run, setting, place, title = "") {
  const found = DATA.images.runs[run];
  if (!found?.sheets[setting]) return h("div", { class: "cell", title: "No image of this setting" });
  const { columns, tags, captions } = DATA.images.sets[found.set];
  return cellOf(`${run}.${setting}`, columns, tags.length, place, captions[place], title);
}

const runOf = (name) => DATA.runs.find((run) => run.name === name);
const hasImages = (system) => DATA.systems[system].runs.some((run) => DATA.images.runs[run]);
const setOf = (system) => DATA.images.runs[DATA.systems[system].runs.find((run) => DATA.images.runs[run])].set;
const nfeOf = (setting) => Number(setting.slice(setting.lastIndexOf("-") + 1));

/** The run of a system with a seed; a system that is not trained has one run. */
function runWith(system, seed) {
  const { runs } = DATA.systems[system];
  return runs.find((name) => runOf(name).seed === seed) ?? (DATA.systems[system].trained ? null : runs[0]);
}

/** The systems of the main table, in its order. */
function mainSystems(systems) {
  const table = Object.keys(DATA.gains)[0];
  const rows = table ? unique([...document.querySelectorAll(`.sheet[data-sheet="${CSS.escape(table)}"] tbody tr`)].map((row) => row.dataset.system)) : [];
  const found = rows.filter((system) => systems.includes(system));
  return found.length ? found : systems.slice(0, 8);
}

views.gallery = () => {
  const every = Object.keys(DATA.systems).filter(hasImages);
  const modes = [["grid", "Side by side"], ["wins", "Wins and losses"], ["vote", "Blind vote"]];
  if (Object.keys(DATA.images.trajectories).length) modes.splice(1, 0, ["trajectory", "Step by step"]);
  const mode = modes.some(([name]) => name === get("mode")) ? get("mode") : "grid";
  const controls = [buttons("Show", "mode", modes, mode)];
  const body = at("gallery-body");
  body.className = DATA.images.exact ? "exact" : "";
  const sets = unique(every.map(setOf));
  const chosenSet = sets.includes(Number(get("set", "-1"))) ? Number(get("set")) : setOf(mainSystems(every)[0]);
  const systems = every.filter((system) => setOf(system) === chosenSet);
  if (sets.length > 1) controls.push(choice("Prompts", "set", sets.map((one) => [one, `${DATA.images.sets[one].tags.length} prompts: ${DATA.images.sets[one].captions[0]} …`]), chosenSet));
  const chosen = get("systems") ? get("systems").split(" ").filter((one) => systems.includes(one)) : mainSystems(systems);
  const draw = { grid: drawGrid, trajectory: drawTrajectory, wins: drawWins, vote: drawVote }[mode];
  draw({ controls, body, systems, chosen, kept: DATA.images.sets[chosenSet] });
  at("gallery-controls").replaceChildren(...controls.filter(Boolean));
};

function drawGrid({ controls, body, systems, chosen, kept }) {
  const settings = unique(chosen.flatMap((system) => Object.keys(DATA.images.runs[DATA.systems[system].runs[0]]?.sheets ?? {}))).filter((setting) => !setting.includes("@"));
  const steps = unique(settings.map(nfeOf)).sort((a, b) => a - b);
  const few = DATA.prompts[chosen[0]]?.nfe;
  const nfe = steps.includes(Number(get("nfe"))) ? Number(get("nfe")) : steps.includes(few) ? few : steps.at(-1);
  const seeds = unique(chosen.flatMap((system) => DATA.systems[system].runs.map((run) => runOf(run).seed))).sort((a, b) => a - b);
  const seed = seeds.includes(Number(get("seed", "-1"))) ? Number(get("seed")) : seeds[0];
  const tags = unique(kept.tags);
  const tag = tags.includes(get("tag")) ? get("tag") : "";
  const metrics = DATA.metrics.map((metric) => metric.name);
  const metric = metrics.includes(get("metric")) ? get("metric") : metrics[0];
  const last = Math.max(...chosen.map((system) => DATA.runs.find((run) => run.system === system)?.spec.training?.iterations ?? 0));
  const snapshotsOf = (run, setting) => Object.keys(DATA.images.runs[run]?.sheets ?? {}).filter((one) => one.startsWith(`${setting}@`)).map((one) => Number(one.split("@")[1]));
  const found = unique(chosen.flatMap((system) => DATA.systems[system].runs.flatMap((run) => snapshotsOf(run, `${DATA.systems[system].sampler}-${nfe}`))));
  const snapshots = found.length ? unique([0, ...found, last]).sort((a, b) => a - b) : [];
  let after = snapshots.length ? nearest(snapshots, get("after"), last) : last;
  /** [run, setting, iterations] of a system: its last kept snapshot so far, or the base model before the first. */
  const shownOf = (system, count) => {
    const run = runWith(system, seed);
    const setting = `${DATA.systems[system].sampler}-${count}`;
    if (!DATA.systems[system].trained || after >= last || count !== nfe) return [run, setting, null];
    const latest = d3.max(snapshotsOf(run, setting).filter((one) => one <= after));
    if (latest !== undefined) return [run, `${setting}@${latest}`, latest];
    const base = DATA.prompts[system]?.base;
    return base ? [DATA.systems[base].runs[0], `${DATA.systems[base].sampler}-${count}`, 0] : [null, setting, 0];
  };
  controls.push(
    slider("Steps", "nfe", steps, nfe, String, redraw),
    snapshots.length > 1 ? slider("Training iterations", "after", snapshots, after, String, (value) => { after = value; redraw(nfe); }) : null,
    choice("Seed", "seed", seeds, seed),
    choice("Task", "tag", [["", "all"], ...tags.map((one) => [one, words(one)])], tag),
    choice("Score below", "metric", metrics.map((one) => [one, titleOf(one)]), metric),
    chips("Systems", "systems", systems, chosen),
  );
  const grid = h("div", { class: "grid" });
  const shown = kept.captions.map((_, place) => place).filter((place) => !tag || kept.tags[place] === tag);
  function redraw(count) {
    grid.style.gridTemplateColumns = `minmax(96px, 190px) repeat(${chosen.length}, clamp(72px, ${Math.floor(72 / chosen.length)}vw, 132px))`;
    const cells = [h("div", { class: "head" }), ...chosen.map((system) => h("div", { class: "head key", style: { "--c": DATA.systems[system].colour } }, DATA.systems[system].name))];
    for (const place of shown) {
      cells.push(h("div", { class: "said" }, kept.captions[place], h("br"), h("small", {}, words(kept.tags[place]))));
      for (const system of chosen) {
        const [run, setting, iterations] = shownOf(system, count);
        const score = DATA.images.runs[run]?.sheets[setting]?.scores[metric]?.[place];
        cells.push(h("div", {}, image(run, setting, place, `${DATA.systems[system].name}, ${count} steps${iterations === null ? "" : `, after ${iterations} iterations`}: ${kept.captions[place]}`), h("div", { class: "score" }, digits(metric, score))));
      }
    }
    grid.replaceChildren(...cells);
  }
  redraw(nfe);
  body.replaceChildren(
    h("p", { class: "note" }, "A row is one prompt and one start noise. Move the slider to change the number of inference steps. An empty cell: the system has no run with this seed, or no image with so many steps.", snapshots.length ? " Before the end of training, each method is at its last kept snapshot; at 0 it is the base model." : ""),
    chosen.length ? scrolling("Images", grid, "framed") : h("p", { class: "note" }, "Choose a system."),
  );
}

/** The images of annealed sampling: its estimate at every step, and the reward of each. */
function drawTrajectory({ controls, body }) {
  const runs = Object.keys(DATA.images.trajectories);
  const run = runs.includes(get("run")) ? get("run") : runs[0];
  const { steps, captions, tags, scores } = DATA.images.trajectories[run];
  const metrics = Object.keys(scores);
  const metric = metrics.includes(get("metric")) ? get("metric") : metrics[0];
  controls.push(choice("Run", "run", runs, run), choice("Score below", "metric", metrics.map((one) => [one, titleOf(one)]), metric));
  const grid = h("div", { class: "grid", style: { "grid-template-columns": `minmax(88px, 190px) repeat(${steps}, clamp(56px, ${Math.floor(60 / steps)}vw, 132px))` } });
  grid.append(h("div", { class: "head" }), ...d3.range(steps).map((step) => h("div", { class: "head" }, `Step ${step + 1}`)));
  captions.forEach((caption, prompt) => {
    grid.append(h("div", { class: "said" }, caption, h("br"), h("small", {}, words(tags[prompt]))));
    scores[metric][prompt].forEach((score, step) => grid.append(h("div", {},
      cellOf(`${run}.trajectories`, steps, steps * captions.length, prompt * steps + step, `${caption}, step ${step + 1}`),
      h("div", { class: "score" }, digits(metric, score)))));
  });
  body.replaceChildren(
    h("p", { class: "note" }, "Annealed sampling estimates the whole image at every step, then adds fresh noise. TAFS-GRPO scores every estimate and credits each step with the reward of the image it leads to."),
    scrolling("Trajectories", grid, "framed"),
  );
}

function drawWins({ controls, body, systems, kept }) {
  const able = systems.filter((system) => DATA.prompts[system]?.tasks);
  if (!able.length) return body.replaceChildren(h("p", { class: "note" }, "No trained system has a base model on the same prompts."));
  const system = able.includes(get("system")) ? get("system") : mainSystems(able)[0];
  const own = DATA.prompts[system];
  const base = DATA.prompts[own.base];
  const metrics = Object.keys(own.tasks);
  const metric = metrics.includes(get("metric")) ? get("metric") : metrics[0];
  const tags = Object.keys(own.tasks[metric]).filter(Boolean);
  const tag = tags.includes(get("tag")) ? get("tag") : "";
  controls.push(
    choice("System", "system", able.map((one) => [one, DATA.systems[one].name]), system),
    choice("Metric", "metric", metrics.map((one) => [one, titleOf(one)]), metric),
    choice("Task", "tag", [["", "all"], ...tags.map((one) => [one, words(one)])], tag),
  );
  const up = METRICS.get(metric).up ? 1 : -1;
  const rows = ["", ...tags].map((task) => ({ task: task ? words(task) : "all prompts", values: own.tasks[metric][task] })).filter((row) => row.values[0] !== null);
  const chart = plot("", {
    width: fitting("gallery-body", 640), height: 44 + 26 * rows.length, marginLeft: 110, x: { label: `${titleOf(metric)}: difference from ${DATA.systems[own.base].name}`, inset: 6 }, y: { label: null, domain: rows.map((row) => row.task) },
    marks: [
      Plot.ruleX([0], { strokeOpacity: 0.6 }),
      Plot.ruleY(rows.filter((row) => row.values[1] !== null), { y: "task", x1: (row) => row.values[1], x2: (row) => row.values[2], stroke: colourOf(system), strokeWidth: 2 }),
      Plot.dot(rows, { y: "task", x: (row) => row.values[0], fill: colourOf(system), r: 4.5, tip: true, title: (row) => `${row.task}: ${row.values[0]}\n95 %: ${row.values[1]} to ${row.values[2]}` }),
    ],
  });
  const differences = own.means[metric].map((value, place) => ({ place, difference: value === null || base.means[metric][place] === null ? null : value - base.means[metric][place] }))
    .filter((row) => row.difference !== null && (!tag || kept.tags[row.place] === tag))
    .sort((a, b) => up * (b.difference - a.difference));
  const setting = (one) => `${DATA.systems[one].sampler}-${own.nfe}`;
  const pair = ({ place, difference }) => h("div", { class: "pair" },
    image(DATA.systems[own.base].runs[0], setting(own.base), place), image(DATA.systems[system].runs[0], setting(system), place),
    h("p", {}, kept.captions[place], h("br"), h("small", {}, `${words(kept.tags[place])} · ${difference > 0 ? "+" : "−"}${digits(metric, Math.abs(difference))}`)));
  const better = differences.filter((row) => up * row.difference > 0).slice(0, 12);
  const worse = differences.filter((row) => up * row.difference < 0).reverse().slice(0, 12);
  const list = (rows_, none) => (rows_.length ? h("div", { class: "pairs" }, rows_.map(pair)) : h("p", { class: "note" }, none));
  body.replaceChildren(
    h("p", { class: "note" }, `${DATA.systems[system].name} against ${DATA.systems[own.base].name} at ${own.nfe} steps: means over seeds and images, with 95 % intervals over all held-out prompts.`),
    chart,
    h("h2", {}, "Largest wins"), h("p", { class: "note" }, "Left the base model, right the trained one, from the same start noise. Of the prompts whose images are kept; the number is the difference of the prompt's mean score."), list(better, "No prompt improved."),
    h("h2", {}, "Largest losses"), list(worse, "No prompt got worse."),
  );
}
