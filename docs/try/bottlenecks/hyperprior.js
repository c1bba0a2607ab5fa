// A latent under a hyperprior at any quality (`oscar/bottlenecks/hyperprior.py`).

import { Coding, MAX_QUALITY } from "../bitstream/container.js";
import { HyperpriorCoder, STEPS } from "../bitstream/hyperprior.js";
import { scale } from "../tensors.js";

/** @typedef {import("../bitstream/hyperprior.js").Coded} Coded */
/** @typedef {{shape: [number, number], coded: Coded, values: Int32Array}} Symbols */

export class Hyperprior {
  pointName = "quality";
  words = "a hyperprior";
  codings = [Coding.HYPERPRIOR];
  /** Operating points from small to large files, as files hold them. */
  points = Array.from({ length: MAX_QUALITY + 1 }, (_, code) => code);
  defaultPoint = Math.round(MAX_QUALITY / 2);

  /** @param {import("../safetensors.js").Tensors} tensors of the checkpoint */
  constructor(tensors) {
    this.coder = new HyperpriorCoder((name) => tensors.get(`coder.${name}`));
    this.gains = tensors.has("bottleneck.log_gain") && tensors.get("bottleneck.log_gain");
    this.sideGains = tensors.has("bottleneck.log_side_gain") && tensors.get("bottleneck.log_side_gain");
    this.inverse = tensors.get("bottleneck.log_inverse");
  }

  /** What users say: 0 to 1. */
  value = (code) => code / MAX_QUALITY;
  label = (code) => `quality ${this.value(code).toFixed(2)}`;
  multiple = () => 1;

  /** Bytes that the tag of a file depends on beyond the fingerprint. */
  digest = () => new Uint8Array();

  /** @param {import("../tensors.js").Planes} latent @returns {Promise<Symbols>} */
  async quantise(latent, code, run) {
    const side = scale(await run("hyper_encoder", latent), this.#gain(this.sideGains, code));
    const wanted = scale(latent, this.#gain(this.gains, code));
    const shape = [latent.height, latent.width];
    return { shape, ...this.coder.choose(wanted.data, side.data.map(Math.round), shape, code) };
  }

  write({ coded, shape }) {
    return { coding: Coding.HYPERPRIOR, side: new Uint8Array(), payload: this.coder.write(coded, shape) };
  }

  /** @returns {Symbols} */
  read({ payload, pointCode }, shape) {
    return { shape, ...this.coder.read(payload, shape, pointCode) };
  }

  /** The same of a file's first bytes, and the share of the symbols that was read. */
  readPrefix({ payload, pointCode }, shape) {
    return { shape, ...this.coder.readPrefix(payload, shape, pointCode) };
  }

  /** @returns {Promise<import("../tensors.js").Planes>} */
  async dequantise({ values, shape: [height, width] }, code) {
    const latent = { channels: this.coder.channels, height, width, data: Float32Array.from(values) };
    return scale(
      latent,
      this.#gain(this.inverse, code).map((gain) => gain / STEPS),
    );
  }

  /** Gains of the channels at a quality: logarithms are linear between the knots. */
  #gain({ shape: [knots, channels], data }, code) {
    const place = this.value(code) * (knots - 1);
    const knot = Math.min(Math.floor(place), knots - 2);
    return Array.from({ length: channels }, (_, channel) => {
      const [low, high] = [data[knot * channels + channel], data[(knot + 1) * channels + channel]];
      return Math.exp(low + (high - low) * (place - knot));
    });
  }
}
