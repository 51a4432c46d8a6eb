// The runs: learning curves, and what each run was made from.
const PREFERRED = ["kl", "clip_fraction", "reward_std", "grad_norm"];

views.runs = () => {
  const systems = Object.keys(DATA.systems);
  const system = systems.includes(get("system")) ? get("system") : "";
  const trained = systems.filter((one) => DATA.systems[one].trained);
  const chosen = system ? [system] : mainSystems(trained);
  const runs = DATA.runs.filter((run) => (system ? run.system === system : true));
  const drawn = DATA.runs.filter((run) => chosen.includes(run.system) && run.curves.iteration);
  at("runs-controls").replaceChildren(choice("System", "system", [["", "all"], ...systems.map((one) => [one, DATA.systems[one].name])], system));
  const keys = unique(drawn.flatMap((run) => Object.keys(run.curves))).filter((key) => key !== "iteration" && new Set(drawn.flatMap((run) => run.curves[key] ?? [])).size > 1);
  const rank = (key) => (key.startsWith("reward ") ? 0 : PREFERRED.includes(key) ? 1 + PREFERRED.indexOf(key) : key.startsWith("seconds ") ? 20 : 10);
  const ordered = keys.sort((a, b) => rank(a) - rank(b));
  const titles = (key) => (key.startsWith("reward ") ? `Reward: ${titleOf(key.slice(7))}` : key.startsWith("seconds ") ? `Seconds of an iteration: ${key.slice(8)}` : JOURNAL[key] ?? words(key)[0].toUpperCase() + words(key).slice(1));
  const opened = runOf(get("run"));
  const curves = drawn.length ? [
    h("h2", {}, "Learning curves"),
    h("p", { class: "note" }, "Thick lines are means over seeds, thin ones are runs."),
    legend(unique(drawn.map((run) => run.system))),
    h("div", { class: "charts" }, ordered.map((key) => curveChart(titles(key), drawn.filter((run) => run.curves[key]), key))),
  ] : [];
  const list = [
    h("h2", {}, system ? "Its runs" : "All runs"),
    scrolling("All runs", h("table", { class: "plain list" },
      h("thead", {}, h("tr", {}, ["Run", "System", "Seed", "Iterations", "Started (UTC)", "Seconds", "Commit", "MLflow"].map((title, i) => h("th", { scope: "col", class: [2, 3, 5].includes(i) ? "n" : null }, title)))),
      h("tbody", {}, runs.map((run) => h("tr", {},
        h("td", {}, h("a", { href: runLink(run) }, run.name)),
        h("td", {}, h("span", { class: "key", style: { "--c": DATA.systems[run.system].colour } }, DATA.systems[run.system].name)),
        h("td", { class: "n" }, String(run.seed)),
        h("td", { class: "n" }, run.spec.training ? String(run.spec.training.iterations) : "–"),
        h("td", {}, run.started || "–"),
        h("td", { class: "n" }, run.seconds ? run.seconds.toFixed(1) : "–"),
        h("td", {}, h("code", {}, (run.origin.provenance?.git_commit ?? "–").slice(0, 8))),
        h("td", {}, h("a", { href: trackedLink(run), "aria-label": `${run.name} in MLflow` }, "open")))))))];
  at("runs-body").replaceChildren(...[
    opened ? runDetail(opened) : null,
    ...(system ? [list, curves] : [curves, list]).flat(),
  ].filter(Boolean));
};

function runLink(run) {
  return `#runs?${new URLSearchParams({ ...(get("system") ? { system: get("system") } : {}), run: run.name })}`;
}

/** The page of the workflow's copy in MLflow, which knows the ids and the server's address. */
const trackedLink = (run) => `../tracked.html#${encodeURIComponent(run.name)}`;

function runDetail(run) {
  const folder = `../runs/${encodeURIComponent(run.name)}/`;
  const link = (name) => h("a", { href: folder + name.split("/").map(encodeURIComponent).join("/") }, name);
  const size = (bytes) => (bytes > 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e3).toFixed(1)} kB`);
  const origin = run.origin.provenance ?? {};
  const flat = (value, prefix = "") => Object.entries(value ?? {}).flatMap(([key, inner]) =>
    inner && typeof inner === "object" && !Array.isArray(inner) ? flat(inner, `${prefix}${key}.`) : [[prefix + key, inner]]);
  const rows = (entries) => h("table", { class: "plain" }, h("tbody", {}, entries.map(([key, value]) =>
    h("tr", {}, h("td", {}, key), h("td", {}, h("code", {}, Array.isArray(value) ? JSON.stringify(value) : String(value ?? "–")))))));
  const part = (title, content, open = false) => h("details", { class: "notes", open }, h("summary", {}, title), scrolling(title, content));
  const choices = run.samplers.map(([nfe, after, name]) => [`${nfe} steps, after ${after} iterations`, name]);
  const stages = run.spec.training ? ["training.train", "evaluation.evaluate"] : ["evaluation.evaluate"];
  return h("article", { class: "detail", id: "run-detail" },
    h("h2", {}, run.name),
    h("p", { class: "note" }, `${DATA.systems[run.system].name}, seed ${run.seed}${origin.git_commit ? `, commit ${origin.git_commit}${origin.git_changed ? " with changes" : ""}` : ""}`),
    h("pre", {}, stages.map((stage) => `python -m tafs.${stage} results/${DATA.scale}/runs/${run.name}`).join("\n")),
    h("p", { class: "note" }, h("a", { href: trackedLink(run) }, "This run in MLflow"), ", once ", h("code", {}, "tafs run"), " or ", h("code", {}, "tafs sync"), " has copied it; the link's page says how to start MLflow."),
    part("Files", h("table", { class: "plain list" }, h("tbody", {}, Object.entries(run.files).map(([name, [bytes, digest]]) =>
      h("tr", {}, h("td", {}, link(name)), h("td", { class: "n" }, size(bytes)), h("td", {}, h("code", {}, digest)))))), true),
    part("Configuration (run.json)", rows(flat(run.spec))),
    part("Evaluation (evaluation.json)", rows(flat(run.evaluation))),
    choices.length ? part("Chosen samplers", rows(choices)) : null,
    Object.keys(origin).length ? part("Provenance", rows(flat(origin))) : null,
    h("p", {}, copyButton("Copy run.json", () => JSON.stringify(run.spec, null, 1)), " ", h("a", { href: "#runs" }, "Close")));
}
