// The viewer of `oscar app`: it shows what `oscar.app.sessions.View.as_json` describes. Goes behind stage.js, within the
// function that Gradio calls with `element`, `props` and `watch`.

const part = (id) => element.querySelector(`#${id}`);
const fit = startStage(element);
const sides = ["left", "right"].map((side, index) => ({
  select: part(`${side}-codec`), image: part(`${side}-image`), chip: part(`${side}-layer`).querySelector(".chip"),
  wanted: index ? "ours" : "original",
}));
let original = "", size = "";

function node(name, text, className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}

/** What a side can show, by the value of its option. */
function shown() {
  const entries = props.value.entries.map((entry, index) => [index ? entry.label : "ours", entry]);
  return new Map([...(props.value.original ? [["original", { label: "Original", url: original }]] : []), ...entries]);
}

function images() {
  const choices = shown();
  for (const { select, image, chip } of sides) {
    const entry = choices.get(select.value);
    if (entry.url && image.src !== entry.url) image.src = entry.url;
    chip.textContent = entry.bytes ? `${entry.label} · ${entry.bytes} bytes` : entry.label;
    image.alt = chip.textContent;
  }
}

function show() {
  const view = props.value;
  part("viewer").hidden = !view;
  part("empty").hidden = Boolean(view);
  if (!view) return;
  const choices = shown();
  for (const { select, wanted } of sides) {
    select.replaceChildren(...[...choices].map(([value, { label }]) => Object.assign(node("option", label), { value })));
    select.value = choices.has(wanted) ? wanted : "ours"; // what is still being made is shown when it is there
  }
  part("viewer").classList.toggle("single", !view.original);
  images();
  const rows = view.entries.map((entry, index) => {
    const row = node("tr", ""), name = node("th", entry.label, index ? "" : "ours");
    name.scope = "row";
    name.append(node("small", entry.setting, entry.larger ? "warn" : ""));
    row.append(name, ...["bytes", "bpp", "psnr", "ms_ssim"].map((column) => node("td", entry[column])));
    return row;
  });
  // Rows of codecs that are still at work stay, so that nothing moves under the pointer.
  const old = view.original ? [...part("facts").tBodies[0].rows].slice(rows.length) : [];
  for (const row of old) row.className = "old";
  part("facts").tBodies[0].replaceChildren(...rows, ...old);
  part("packed").hidden = !view.packed;
  if (view.packed) {
    Object.assign(part("packed"), { href: view.packed.url, download: view.packed.name });
    part("packed").textContent = `Download ${view.packed.name}`;
  }
  Object.assign(part("image"), { href: view.entries[0].url, download: view.image });
  const now = `${view.width} × ${view.height}`;
  if (now !== size) fit(view); // else zoom and place stay, so that one sees what changes
  size = now;
}

for (const side of sides) {
  side.select.addEventListener("change", () => {
    side.wanted = side.select.value;
    images();
  });
  side.image.addEventListener("error", () => { side.chip.textContent += ", which this browser cannot show"; });
}
document.addEventListener("oscar-original", (event) => {
  original = event.detail;
  size = ""; // another image: it fits the stage again
  if (props.value) show();
});
// Gradio's sliders tell of keys only when they lose the focus.
document.addEventListener("keyup", ({ target, key }) => {
  if (!target.matches?.("#amount input, #share input") || key === "Tab") return;
  if (target.type === "range" || key === "Enter") target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
});
watch("value", show);
