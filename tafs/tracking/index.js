"use strict";
// The links lead to the address in the field, which the browser keeps; nothing else is requested.
const field = document.getElementById("address");
const STORE = `mlflow of ${field.defaultValue}`;

function point() {
  const address = field.value.trim().replace(/\/+$/, "");
  const valid = /^https?:\/\/[^/]/i.test(address) && URL.canParse(address);
  field.setCustomValidity(valid ? "" : "an address such as http://127.0.0.1:5000");
  for (const link of document.querySelectorAll("[data-path]")) {
    if (valid) link.href = `${address}/${link.dataset.path}`;
    else link.removeAttribute("href");
  }
  return valid;
}

try {
  field.value = localStorage.getItem(STORE) ?? field.value;
} catch { /* a browser may refuse to store anything for a file */ }
field.addEventListener("input", () => {
  if (!point()) return;
  try {
    localStorage.setItem(STORE, field.value);
  } catch { /* as above */ }
});
point();
