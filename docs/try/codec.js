// The codec: image <-> bytes (`oscar/codec.py`). The networks are graphs that `run` runs (networks.js).
//
// encode   image - VAE encoder - latent - bottleneck.quantise(point) - symbols - bottleneck.write - payload - bytes
// decode   bytes - payload - bottleneck.read - symbols - bottleneck.dequantise - z_hat - denoiser at t(point), ONE step
//          - x0 - VAE decoder - image

import { pack, unpack } from "./bitstream/container.js";
import { fromHex, sha256 } from "./bitstream/digest.js";
import { UnknownRateError, WrongModelError } from "./bitstream/errors.js";
import { Hyperprior } from "./bottlenecks/hyperprior.js";
import { VectorQuantiser } from "./bottlenecks/vq.js";
import { fromPixels, pad, resize, toPixels } from "./tensors.js";

const KINDS = { hyperprior: Hyperprior, vq: VectorQuantiser };
const FEW = 64; // points that are tried one by one; of more, bytes are taken to rise from point to point

/** @typedef {import("./tensors.js").Pixels} Pixels */
/** @typedef {(graph: string, ...inputs: object[]) => Promise<object>} Run */

export class Codec {
  #latents = new WeakMap();

  /**
   * @param {object} config `oscar.json` of the model
   * @param {object} runtime `runtime.json`
   * @param {import("./safetensors.js").Tensors} tensors `oscar.safetensors`
   * @param {Run} run
   */
  constructor(config, runtime, tensors, run) {
    Object.assign(this, { config, runtime, run });
    this.bottleneck = new KINDS[config.bottleneck.kind ?? "vq"](tensors, config.bottleneck);
  }

  /** The file of an image at an operating point. @param {Pixels} pixels @returns {Promise<Uint8Array>} */
  async compress(pixels, point) {
    const { width, height } = pixels;
    const symbols = await this.bottleneck.quantise(await this.#latent(pixels, point), point, this.run);
    const { coding, side, payload } = this.bottleneck.write(symbols, point);
    const modelTag = await this.#tag(coding, point);
    return pack({ coding, pointCode: point, modelTag, width, height, side, timestep: null, payload });
  }

  /**
   * The file of the highest operating point that has at most so many bytes (`oscar/rate_control.py`, without effort).
   *
   * @param {(share: number) => void} progress
   * @throws {RangeError} with the lengths that can be had, if there is none
   */
  async compressWithin(pixels, maxBytes, progress = () => {}) {
    const { points } = this.bottleneck;
    const files = new Map();
    const tries = points.length > FEW ? Math.ceil(Math.log2(points.length)) + 2 : points.length;
    const file = async (point) => {
      if (!files.has(point)) {
        files.set(point, await this.compress(pixels, point));
        progress(Math.min(1, files.size / tries));
      }
      return files.get(point);
    };
    const fits = async (point) => (await file(point)).length <= maxBytes;
    let best;
    if (points.length <= FEW) {
      for (const point of [...points].reverse()) {
        if (await fits(point)) {
          best = point;
          break;
        }
      }
    } else if (await fits(points[0])) {
      let [low, high] = [0, points.length]; // fits, does not fit
      if (await fits(points.at(-1))) low = points.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (await fits(points[middle])) low = middle;
        else high = middle;
      }
      best = points[low];
    }
    if (best !== undefined) return { data: files.get(best), point: best };
    const [smallest, largest] = [(await file(points[0])).length, (await file(points.at(-1))).length];
    throw new RangeError(`${maxBytes} bytes are too few for this image; reachable: ${smallest} to ${largest} bytes`);
  }

  /**
   * Read a file's header, if this model wrote it.
   *
   * @param {Uint8Array} data
   * @param {boolean} whole without it the file's end may be missing
   * @returns {Promise<import("./bitstream/container.js").Container>}
   * @throws {BitstreamError} if it is damaged, foreign, or was written with another model
   */
  async open(data, whole = true) {
    const container = unpack(data, whole);
    const { coding, pointCode, modelTag, timestep } = container;
    if (!this.bottleneck.codings.includes(coding)) {
      throw new WrongModelError(`the file was not written by a model with ${this.bottleneck.words}, as this one`);
    }
    if (!this.bottleneck.points.includes(pointCode)) {
      throw new UnknownRateError(`the file has ${this.bottleneck.label(pointCode)}, which this model does not have`);
    }
    const tag = await this.#tag(coding, pointCode);
    if (modelTag !== tag) {
      const [theirs, ours] = [modelTag, tag].map((value) => value.toString(16).padStart(4, "0"));
      throw new WrongModelError(`the file was written with model ${theirs}; this model is ${ours}`);
    }
    if (timestep !== null) throw new WrongModelError("the file has a timestep of its own; this model's have none");
    return container;
  }

  /** Symbols of a file that `open` gave; PayloadError if they are damaged. */
  read(container) {
    return this.bottleneck.read(container, this.#latentShape(container));
  }

  /** The same of a part of a file, and the share of the symbols that was read. */
  readPrefix(container) {
    return this.bottleneck.readPrefix(container, this.#latentShape(container));
  }

  /** Symbols to image. @returns {Promise<Pixels>} */
  async decode(symbols, { pointCode, height, width }) {
    const latent = await this.bottleneck.dequantise(symbols, pointCode, this.run);
    const timestep = { data: Float32Array.of(this.timestep(pointCode)), shape: [1] };
    const x0 = await this.run("denoiser", pad(latent, this.runtime.unet_multiple), timestep);
    return toPixels(await this.run("vae_decoder", resize(x0, latent.height, latent.width)), height, width);
  }

  /** The image of a file. @param {Uint8Array} data @returns {Promise<Pixels>} */
  async decompress(data) {
    const container = await this.open(data);
    return this.decode(this.read(container), container);
  }

  /** Pseudo-timestep of an operating point. */
  timestep(point) {
    const { kind, timesteps } = this.config.timesteps;
    if (kind !== "curve") return timesteps[point]; // a table
    const place = this.bottleneck.value(point) * (timesteps.length - 1);
    const below = Math.min(Math.floor(place), timesteps.length - 2);
    return timesteps[below] + (timesteps[below + 1] - timesteps[below]) * (place - below);
  }

  /** The latent of an image, kept as long as the image is. */
  async #latent(pixels, point) {
    const multiple = this.runtime.factor * this.bottleneck.multiple(point);
    const kept = this.#latents.get(pixels) ?? new Map();
    this.#latents.set(pixels, kept);
    if (!kept.has(multiple)) kept.set(multiple, await this.run("vae_encoder", fromPixels(pixels, multiple)));
    return kept.get(multiple);
  }

  #latentShape({ height, width }) {
    return [height, width].map((side) => Math.ceil(side / this.runtime.factor));
  }

  /** First 16 bits of the fingerprint, or of a digest of it and what the coding needs beyond. */
  async #tag(coding, point) {
    const fingerprint = fromHex(this.config.fingerprint);
    const more = await this.bottleneck.digest(coding, point);
    const digest = more.length ? await sha256(fingerprint, more) : fingerprint;
    return (digest[0] << 8) | digest[1];
  }
}
