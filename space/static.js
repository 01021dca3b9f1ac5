"use strict";
const { prompts, columns } = JSON.parse(document.getElementById("samples").textContent);
const chosen = (name) => Number(document.getElementById(name).value);
function show() {
  const prompt = chosen("prompt");
  for (const side of ["left", "right"]) {
    const { label, settings, texts } = columns[chosen(side)];
    const pane = document.getElementById(side + "-pane");
    const [words, text] = pane.querySelector(".words").children;
    pane.querySelector("h3").textContent = label;
    pane.querySelector(".how").textContent = settings;
    words.textContent = prompts[prompt];
    text.textContent = texts[prompt] === null ? " (not written for this prompt)" : texts[prompt];
  }
}
if (columns.length) {
  document.querySelector(".choose").hidden = false;
  for (const name of ["prompt", "left", "right"]) document.getElementById(name).addEventListener("change", show);
  show();
}
