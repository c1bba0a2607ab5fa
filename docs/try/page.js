// The page: takes a file, asks the worker, shows what comes back.

import { MAX_QUALITY, unpack } from "./bitstream/container.js";
import { RATES } from "./bitstream/rates.js";

const MAX_PIXELS = 2048 * 2048;
const FEW_BYTES = 64 << 20; // an `.oscar` file of an image that is not too large has far fewer

const byId = (id) => document.getElementById(id);
const [drop, file, line, bar, quality, size, share] = ["drop", "file", "line", "bar", "quality", "size", "share"].map(
  byId,
);
const count = (number) => number.toLocaleString("en");
/** Ids of the rates of a model that has some, from small to large files; null of one with qualities. */
const ratesOf = (name) => {
  const ids = manifest?.rates?.[name];
  return ids ? [...ids].sort((one, other) => RATES[one].bpp - RATES[other].bpp) : null;
};
const model = () => document.querySelector("input[name=model]:checked").value;
const setModel = (name) => (document.querySelector(`input[name=model][value="${name}"]`).checked = true);

const fit = startStage(document); // of stage.js
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let manifest;
let opened = null; // {name, pixels} of an image, {name, data} of a file
let coded = null; // bytes of the file that is shown
let jobs = 0;

worker.addEventListener("message", ({ data: { id, progress, result, error } }) => {
  if (progress) {
    if (id === jobs) say(progress.text + "…", progress.share ?? null);
    return;
  }
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined || id !== jobs) resolve(result);
  else reject(new Error(error));
});
worker.addEventListener("error", (event) => {
  event.preventDefault();
  fail(`this browser cannot run the codec: ${event.message ?? "it has no modules in workers"}`);
});

/** Have the worker do something. */
function ask(job, options) {
  return new Promise((resolve, reject) => {
    waiting.set(++jobs, { resolve, reject });
    worker.postMessage({ id: jobs, job, ...options });
  });
}

/** One line of text; with a share from 0 to 1 or null, for one that is not known, a bar too. */
function say(text, part) {
  line.textContent = text;
  line.classList.remove("wrong");
  bar.hidden = part === undefined;
  if (part === null) bar.removeAttribute("value");
  else if (part !== undefined) bar.value = part;
}

function fail(text) {
  say(text);
  line.classList.add("wrong");
}

// What goes in.

/** An image as a canvas has it, transparent parts on white. */
async function readImage(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error("not an image that this browser can read, nor an .oscar file");
  }
  const { width, height } = bitmap;
  checkPixels(width, height);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { width, height, data: context.getImageData(0, 0, width, height).data };
}

function checkPixels(width, height) {
  if (width * height > MAX_PIXELS) {
    const pixels = `${count(width)} × ${count(height)} = ${count(width * height)} pixels`;
    throw new Error(`${pixels} are too many for this page; allowed: ${count(MAX_PIXELS)} (2048 × 2048)`);
  }
}

async function open(blob) {
  const stem = blob.name.replace(/\.[^.]*$/, "");
  try {
    const start = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
    if (/\.oscar$/i.test(blob.name) || (start[0] === 5 && start[1] >> 4 === 12)) {
      if (blob.size > FEW_BYTES)
        throw new Error(`${count(blob.size)} bytes are too many; allowed: ${count(FEW_BYTES)}`);
      const data = new Uint8Array(await blob.arrayBuffer());
      const { width, height } = unpack(data);
      checkPixels(width, height);
      await decode({ name: blob.name, stem, data, width, height });
    } else {
      const pixels = await readImage(blob);
      await ask("image", { pixels });
      opened = { name: blob.name, stem, pixels, url: await toUrl(pixels) };
      size.value = "";
      await encode();
    }
  } catch (error) {
    fail(`${blob.name}: ${error.message}`);
  }
}

// What is asked of the worker.

/** Code the image that is open as the controls say. */
async function encode() {
  const number = jobs + 1;
  const wanted = opened;
  const maxBytes = size.value ? Number(size.value) : undefined;
  const name = model();
  const result = await ask("encode", { model: name, point: pointOfSlider(), maxBytes });
  if (number !== jobs) return; // something else was asked since
  setSlider(result.point);
  coded = result.data;
  share.value = 100;
  const { width, height } = result.pixels;
  const bpp = ((8 * coded.length) / (width * height)).toFixed(3);
  const facts = [
    [`${count(coded.length)} bytes`, name],
    [`${bpp} bpp`, label(name, result.point)],
    [Number.isFinite(result.psnr) ? `${result.psnr.toFixed(2)} dB` : "lossless", "PSNR"],
    [`${result.encodeSeconds.toFixed(1)} s`, "to compress"],
    [`${result.decodeSeconds.toFixed(1)} s`, "to decompress"],
  ];
  await show(wanted, result, facts, `${count(coded.length)} bytes`);
}

/** Decode a file, or the first part of the one that is shown. */
async function decode(wanted) {
  const number = jobs + 1;
  const result = await ask("decode", { data: wanted.data });
  if (number !== jobs) return;
  opened = wanted;
  coded = wanted.data;
  share.value = 100;
  setModel(result.model);
  showControls();
  setSlider(result.point);
  const facts = [
    [`${count(coded.length)} bytes`, result.model],
    [`${((8 * coded.length) / (wanted.width * wanted.height)).toFixed(3)} bpp`, label(result.model, result.point)],
    [`${wanted.width} × ${wanted.height}`, "pixels"],
    [`${result.decodeSeconds.toFixed(1)} s`, "to decompress"],
  ];
  await show(wanted, result, facts, `${count(coded.length)} bytes`);
}

async function preview() {
  const number = jobs + 1;
  const part = Number(share.value) / 100;
  const result = await ask("decode", { data: coded, share: part });
  if (number !== jobs) return;
  await setImage(
    "right",
    result.pixels,
    part < 1 ? `First ${share.value} % of the file` : `${count(coded.length)} bytes`,
  );
  say("");
}

/** Do what a control asks for, one line if it fails. */
const run = (work) => async () => {
  if (!opened) return;
  try {
    await work();
  } catch (error) {
    fail(`${opened.name}: ${error.message}`);
  }
};

// What comes out.

async function show({ name, stem, pixels, url }, result, facts, chip) {
  byId("facts").replaceChildren(
    ...facts.map(([value, what]) => {
      const cell = document.createElement("div");
      cell.append(Object.assign(document.createElement("b"), { textContent: value }), what);
      return cell;
    }),
  );
  byId("try").classList.add("open");
  byId("viewer").hidden = false;
  byId("viewer").classList.toggle("single", !pixels);
  byId("preview").hidden = !result.hasPreview;
  byId("share-value").textContent = "100 %";
  byId("amount").hidden = !pixels;
  if (pixels) {
    byId("left-image").src = url;
    byId("left-layer").querySelector(".chip").textContent = "Original";
  }
  await setImage("right", result.pixels, chip);
  byId("image").download = `${stem}.png`;
  const blob = new Blob([coded], { type: "application/octet-stream" });
  setLink(byId("packed"), URL.createObjectURL(blob), `${stem}.oscar`);
  byId("packed").hidden = !pixels;
  const shape = `${result.pixels.width} × ${result.pixels.height}`;
  if (byId("viewer").dataset.shape !== name + shape) fit(result.pixels); // else zoom and place stay
  byId("viewer").dataset.shape = name + shape;
  say(`${name}, ${shape} pixels`);
}

async function toUrl({ width, height, data }) {
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  return URL.createObjectURL(await canvas.convertToBlob({ type: "image/png" }));
}

async function setImage(side, pixels, chip) {
  const image = byId(`${side}-image`);
  const url = await toUrl(pixels);
  URL.revokeObjectURL(image.src);
  image.src = image.alt = "";
  Object.assign(image, { src: url, alt: chip });
  byId(`${side}-layer`).querySelector(".chip").textContent = chip;
  byId("image").href = url;
}

function setLink(link, url, name) {
  if (link.href) URL.revokeObjectURL(link.href);
  Object.assign(link, { href: url, download: name });
}

// The controls.

const label = (name, point) =>
  ratesOf(name) ? `rate ${RATES[point].bpp.toFixed(4)}` : `quality ${(point / MAX_QUALITY).toFixed(2)}`;

function pointOfSlider() {
  const rates = ratesOf(model());
  return rates ? rates[quality.value] : Math.round((Number(quality.value) / Number(quality.max)) * MAX_QUALITY);
}

function setSlider(point) {
  quality.value = ratesOf(model())?.indexOf(point) ?? (point / MAX_QUALITY) * Number(quality.max);
  showSlider(point);
}

function showSlider(point = pointOfSlider()) {
  const text = label(model(), point);
  byId("quality-value").textContent = text[0].toUpperCase() + text.slice(1);
}

/** The slider of the model that is chosen, and what is fetched for it. */
function showControls() {
  const rates = ratesOf(model());
  quality.max = rates ? rates.length - 1 : 100;
  setSlider(rates ? rates[rates.length >> 1] : MAX_QUALITY / 2);
  if (!manifest) return;
  const sum = (sizes) => Object.values(sizes).reduce((total, each) => total + each, 0) / 1e6;
  const [own, ort] = [sum(manifest.models[model()]), sum(manifest.ort)];
  byId("fetched").textContent =
    `${model()} has ${own.toFixed(1)} MB, and ONNX Runtime, which runs it, ${ort.toFixed(1)} MB. Both are fetched from this ` +
    "site with your first file. Your file is sent nowhere.";
}

for (const radio of document.querySelectorAll("input[name=model]")) {
  radio.addEventListener("change", () => {
    showControls();
    if (opened?.pixels) run(encode)();
  });
}
quality.addEventListener("input", () => showSlider());
quality.addEventListener("change", () => {
  size.value = "";
  if (opened?.pixels) run(encode)();
});
size.addEventListener("change", () => {
  if (opened?.pixels && size.reportValidity()) run(encode)();
});
share.addEventListener("input", () => (byId("share-value").textContent = `${share.value} %`));
share.addEventListener("change", run(preview));
file.addEventListener("change", () => {
  if (file.files[0]) open(file.files[0]);
  file.value = ""; // so that the same one can be chosen again
});
for (const type of ["dragover", "dragenter"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget ?? drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => event.clipboardData.files[0] && open(event.clipboardData.files[0]));

showControls();
try {
  manifest = await (await fetch(new URL("manifest.json", import.meta.url))).json();
  if (manifest.missing) throw new Error(manifest.missing);
  showControls();
  say("");
  file.disabled = false;
} catch (error) {
  fail(`this copy of the site cannot code: ${error.message}`);
}
