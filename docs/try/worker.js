// What computes, beside the page: fetches a model, codes and decodes. It answers each message {id, job, ...} with
// {id, progress} while it works, then with {id, result} or {id, error}.

import { hasIndices, unpack } from "./bitstream/container.js";
import { sha256, toHex } from "./bitstream/digest.js";
import { Codec } from "./codec.js";
import { Networks } from "./networks.js";
import { Tensors } from "./safetensors.js";

const at = (path) => new URL(path, import.meta.url);
const codecs = new Map();
let manifest, runtime, image;

/** Fetch files. @param {Record<string, number>} sizes by path @returns {Promise<Map<string, Uint8Array>>} */
async function fetchAll(sizes, folder, arrived) {
  const files = new Map();
  for (const [path, size] of Object.entries(sizes)) {
    const response = await fetch(at(`${folder}/${path}`));
    if (!response.ok) throw new Error(`${folder}/${path} cannot be fetched: ${response.status} ${response.statusText}`);
    const bytes = new Uint8Array(size);
    let length = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (length + value.length <= size) bytes.set(value, length);
      length += value.length;
      arrived(value.length);
    }
    if (length !== size) throw new Error(`${folder}/${path} has ${length} bytes, not ${size}: reload the page`);
    files.set(path, bytes);
  }
  return files;
}

/** @param {string} name of a model @returns {Promise<Codec>} */
async function load(name, progress) {
  if (codecs.has(name)) return codecs.get(name);
  manifest ??= await (await fetch(at("manifest.json"))).json();
  const wanted = { ...(runtime ? {} : { ort: manifest.ort }), [name]: manifest.models[name] };
  const total = Object.values(wanted)
    .flatMap(Object.values)
    .reduce((sum, size) => sum + size, 0);
  let length = 0;
  const arrived = (bytes) => {
    length += bytes;
    progress(`Fetching ${name}: ${(length / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`, length / total);
  };
  runtime ??= await startRuntime(await fetchAll(manifest.ort, "ort", arrived));
  const files = await fetchAll(manifest.models[name], `models/${name}`, arrived);
  const json = (path) => JSON.parse(new TextDecoder().decode(files.get(path)));
  for (const [path, digest] of Object.entries({ ...json("oscar.json").sha256, ...json("runtime.json").sha256 })) {
    if (files.has(path) && toHex(await sha256(files.get(path))) !== digest) {
      throw new Error(`${path} of ${name} is not the file that belongs to it: reload the page`);
    }
  }
  const { run } = new Networks(runtime, files);
  const codec = new Codec(json("oscar.json"), json("runtime.json"), new Tensors(files.get("oscar.safetensors")), run);
  codecs.set(name, codec);
  return codec;
}

async function startRuntime(files) {
  const ort = await import(at("ort/ort.wasm.min.js"));
  const name = "ort-wasm-simd-threaded";
  const wasmPaths = { mjs: at(`ort/${name}.js`).href };
  Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: files.get(`${name}.wasm`), wasmPaths });
  return ort;
}

async function timed(work) {
  const start = performance.now();
  return [await work(), (performance.now() - start) / 1000];
}

/** Peak signal-to-noise ratio of the image and what became of it, in dB. */
function psnr(pixels) {
  let sum = 0;
  for (let place = 0; place < pixels.data.length; place++) sum += (pixels.data[place] - image.data[place]) ** 2;
  return 10 * Math.log10(255 ** 2 / (sum / (3 * pixels.width * pixels.height)));
}

const JOBS = {
  /** Take an image, which `encode` codes. */
  image({ pixels }) {
    image = pixels;
  },

  /** Code the image at a point or in at most so many bytes, and decode what was coded. */
  async encode({ model, point, maxBytes }, progress) {
    const codec = await load(model, progress);
    progress("Compressing");
    const [coded, encodeSeconds] = await timed(async () =>
      maxBytes
        ? codec.compressWithin(image, maxBytes, (share) => progress(`Looking for ${maxBytes} bytes`, share, true))
        : { data: await codec.compress(image, point), point },
    );
    progress("Decompressing");
    const [pixels, decodeSeconds] = await timed(() => codec.decompress(coded.data));
    return { ...coded, pixels, encodeSeconds, decodeSeconds, psnr: psnr(pixels), hasPreview: hasPreview(coded.data) };
  },

  /** Decode a file, or the first `share` of its payload, by the model that its coding asks for. */
  async decode({ data, share = 1 }, progress) {
    const { coding, payload } = unpack(data);
    const model = hasIndices(coding) ? "nano-vq" : "nano";
    const codec = await load(model, progress);
    progress("Decompressing");
    const container = await codec.open(data);
    const part = { ...container, payload: payload.slice(0, Math.round(share * payload.length)) };
    const [pixels, decodeSeconds] = await timed(() =>
      codec.decode(share < 1 ? codec.readPrefix(part) : codec.read(container), container),
    );
    return { model, point: container.pointCode, pixels, decodeSeconds, hasPreview: hasPreview(data) };
  },
};

/** Whether the first bytes of a file show the whole image: codings 2 and 3. */
const hasPreview = (data) => [2, 3].includes((data[2] >> 4) & 7);

let last = Promise.resolve(); // one job at a time
let newest = 0;
addEventListener("message", ({ data: { id, job, ...options } }) => {
  newest = id;
  const isOld = () => id < newest && job !== "image";
  const progress = (text, share, mayStop) => {
    if (mayStop && isOld()) throw new Error("something else was asked");
    postMessage({ id, progress: { text, share } });
  };
  last = last.then(async () => {
    try {
      await new Promise((resolve) => setTimeout(resolve)); // so that what was asked meanwhile is known
      postMessage({ id, result: isOld() ? null : await JOBS[job](options, progress) });
    } catch (error) {
      postMessage({ id, error: String(error.message ?? error).split("\n")[0] });
    }
  });
});
