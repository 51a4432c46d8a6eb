// Blind votes: two unnamed images of one prompt; the keyboard chooses; a file holds the votes.
const ballot = { votes: [], pair: null };
const STORE = `votes ${DATA.scale} ${DATA.runs[0]?.origin.fingerprint ?? ""}`;

try { // a browser may refuse to store anything for a file
  ballot.votes = JSON.parse(localStorage.getItem(STORE) ?? "[]");
} catch { /* votes then last as long as the page is open */ }

function keepVotes() {
  try {
    localStorage.setItem(STORE, JSON.stringify(ballot.votes));
  } catch { /* as above */ }
}

const anyOf = (list) => list[Math.floor(Math.random() * list.length)];

/** Two systems, a prompt and a seed, chosen at random. */
function nextPair(systems, kept) {
  const left = anyOf(systems);
  const right = anyOf(systems.filter((other) => other !== left));
  const seed = anyOf(DATA.systems[left].runs.map((run) => runOf(run).seed));
  const side = (system) => ({ system, run: runWith(system, seed) ?? anyOf(DATA.systems[system].runs) });
  return { left: side(left), right: side(right), place: Math.floor(Math.random() * kept.captions.length) };
}

function drawVote({ controls, body, systems, chosen, kept }) {
  const nfe = DATA.prompts[chosen[0]]?.nfe;
  const able = chosen.filter((system) => DATA.images.runs[DATA.systems[system].runs[0]].sheets[`${DATA.systems[system].sampler}-${nfe}`]);
  controls.push(chips("Systems in the vote", "systems", systems, chosen));
  if (able.length < 2) {
    ballot.pair = null;
    return body.replaceChildren(h("p", { class: "note" }, "Choose two or more systems."));
  }
  const valid = ballot.pair && ["left", "right"].every((side) => able.includes(ballot.pair[side].system)) && ballot.pair.place < kept.captions.length;
  if (!valid) ballot.pair = nextPair(able, kept);
  const { pair } = ballot;
  ballot.cast = (winner) => {
    ballot.votes.push({
      prompt: kept.captions[pair.place], task: kept.tags[pair.place], nfe, left: pair.left.system, right: pair.right.system,
      left_run: pair.left.run, right_run: pair.right.run, winner,
    });
    ballot.pair = null;
    keepVotes();
    show();
  };
  ballot.undo = () => {
    ballot.votes.pop();
    keepVotes();
    show();
  };
  const side = (name) => h("button", { type: "button", "aria-label": `The ${name} image is better`, onclick: () => ballot.cast(name) },
    image(pair[name].run, `${DATA.systems[pair[name].system].sampler}-${nfe}`, pair.place, kept.captions[pair.place]));
  const count = ballot.votes.length;
  body.replaceChildren(h("div", { class: "vote" },
    h("p", { class: "caption" }, `“${kept.captions[pair.place]}”`),
    h("div", { class: "sides" }, side("left"), side("right")),
    h("p", { class: "note", style: { "max-width": "none" } }, h("kbd", {}, "←"), " left is better   ", h("kbd", {}, "→"), " right is better   ", h("kbd", {}, "↓"), " equal   ", h("kbd", {}, "U"), " undo; or press the better image"),
    h("p", { id: "votes-count", style: { "max-width": "none" } }, `${count} vote${count === 1 ? "" : "s"}`),
    h("span", { class: "group" },
      h("button", { type: "button", onclick: () => ballot.cast("tie") }, "Equal"),
      h("button", { type: "button", disabled: !count, onclick: ballot.undo }, "Undo")),
    " ",
    h("span", { class: "group" },
      h("button", { type: "button", id: "votes-save", disabled: !count, onclick: saveVotes }, "Save votes"),
      h("button", { type: "button", disabled: !count, onclick: () => { ballot.votes = []; keepVotes(); show(); } }, "Discard votes")),
    h("p", { class: "note", style: { "max-width": "none" } }, "The names stay hidden. ", h("code", {}, "tafs votes FILE"), " turns saved files of one or more people into win rates with intervals."),
  ));
}

function saveVotes() {
  const text = JSON.stringify({ kind: "tafs votes", scale: DATA.scale, votes: ballot.votes }, null, 1);
  const link = h("a", { href: `data:application/json,${encodeURIComponent(text)}`, download: `votes-${DATA.scale}.json` });
  document.body.append(link);
  link.click();
  link.remove();
}

document.addEventListener("keydown", (event) => {
  if (state.view !== "gallery" || get("mode") !== "vote" || !ballot.pair) return;
  if (event.target.matches("select, input, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const winner = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie" }[event.key];
  if (winner) ballot.cast(winner);
  else if (event.key.toLowerCase() === "u" && ballot.votes.length) ballot.undo();
  else return;
  event.preventDefault();
});
