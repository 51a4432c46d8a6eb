// The theme, the cards' copy button, and the view that the address names.
const THEMES = ["auto", "light", "dark"];
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";

try {
  theme = localStorage.getItem("theme") ?? "auto";
} catch { /* a browser may refuse to store anything for a file */ }

function applyTheme() {
  ROOT.dataset.theme = theme === "auto" ? (prefersDark.matches ? "dark" : "light") : theme;
  at("theme").replaceChildren(h("span", {}, "Theme: "), theme);
}

at("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  try {
    localStorage.setItem("theme", theme);
  } catch { /* as above */ }
  applyTheme();
  show();
});
prefersDark.addEventListener("change", () => { applyTheme(); show(); });
addEventListener("hashchange", () => { readAddress(); show(); scrollTo(0, 0); });

/** Draw all views for paper, which has no tabs. */
function drawEverything() {
  if (printing) return;
  printing = true;
  ROOT.dataset.theme = "light";
  for (const section of document.querySelectorAll("[data-section]")) section.hidden = false;
  for (const draw of Object.values(views)) draw();
}

/** Print when all images are loaded, for which a browser's own command does not wait. */
async function printEverything() {
  drawEverything();
  const sheets = unique([...document.querySelectorAll(".cell[data-sheet]")].map((cell) => cell.dataset.sheet));
  await Promise.allSettled(sheets.map((sheet) => Object.assign(new Image(), { src: sheet }).decode()));
  print();
}

at("print").addEventListener("click", printEverything);
addEventListener("beforeprint", drawEverything);
addEventListener("afterprint", () => { printing = false; applyTheme(); show(); });

const citation = at("citation");
if (citation) citation.before(copyButton("Copy BibTeX", () => citation.textContent));
applyTheme();
readAddress();
show();
