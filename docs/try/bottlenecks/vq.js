// The paper's bottleneck: one hyper-encoder per rate, indices in files, norms beside them (`oscar/bottlenecks/vq.py`).

import { Coding } from "../bitstream/container.js";
import { ContextModel, decodeGrid, encodeGrid } from "../bitstream/context.js";
import { sha256, int32Bytes } from "../bitstream/digest.js";
import { PayloadError, WrongModelError } from "../bitstream/errors.js";
import { RMS, quantiseRms } from "../bitstream/norms.js";
import { RATES } from "../bitstream/rates.js";
import { channelRms, scale } from "../tensors.js";

/**
 * @typedef {object} Symbols
 * @property {[number, number]} shape rows and columns
 * @property {Uint16Array} grid indices
 * @property {Uint8Array} norms codes of the channels' root mean squares
 */

export class VectorQuantiser {
  pointName = "rate";
  words = "rates";
  codings = [Coding.PACKED, Coding.TABLE, Coding.CONTEXT];

  /**
   * @param {import("../safetensors.js").Tensors} tensors of the checkpoint
   * @param {{rates: number[]}} config of the bottleneck
   */
  constructor(tensors, config) {
    this.tensors = tensors;
    /** Ids from small to large files. */
    this.points = [...config.rates].sort((one, other) => RATES[one].bpp - RATES[other].bpp);
    this.defaultPoint = this.points[this.points.length >> 1];
    this.contexts = {};
    for (const id of this.points.filter((id) => tensors.has(`context.${id}.leaf`))) {
      const arrays = ContextModel.NAMES.map((name) => [name, tensors.get(`context.${id}.${name}`)]);
      this.contexts[id] = new ContextModel(Object.fromEntries(arrays));
    }
  }

  value = (id) => RATES[id].bpp;
  label = (id) => `rate ${RATES[id].bpp.toFixed(4)}`;
  multiple = (id) => RATES[id].downsample;

  /** Bytes that the tag of a file depends on beyond the fingerprint: the digest of the context model. */
  async digest(coding, id) {
    if (coding !== Coding.CONTEXT) return new Uint8Array();
    if (!this.contexts[id])
      throw new WrongModelError(`the file is coded by context; this model has none for ${this.label(id)}`);
    const { arrays } = this.contexts[id];
    const parts = Object.entries(arrays).flatMap(([name, { shape, data }]) => {
      const tuple = shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`;
      return [new TextEncoder().encode(`${name}:${tuple};`), int32Bytes(data)];
    });
    return sha256(...parts);
  }

  /** Nearest codes. @param {import("../tensors.js").Planes} latent @returns {Promise<Symbols>} */
  async quantise(latent, id, run) {
    const { data } = await run(`hyper_encoder_${id}`, latent); // (1, rows, columns, width)
    const shape = this.#gridShape(id, [latent.height, latent.width]);
    const codebook = this.#codebook(id);
    const { width } = codebook;
    const grid = Uint16Array.from({ length: shape[0] * shape[1] }, (_, place) =>
      nearest(data.subarray(place * width, (place + 1) * width), codebook),
    );
    return { shape, grid, norms: Uint8Array.from(channelRms(latent), quantiseRms) };
  }

  write({ grid, shape, norms }, id) {
    const { coding, payload } = encodeGrid(grid, shape, this.#frequencies(id), this.contexts[id]);
    return { coding, side: norms, payload };
  }

  /** @returns {Symbols} */
  read({ payload, coding, pointCode, side }, latentShape) {
    const shape = this.#gridShape(pointCode, latentShape);
    const grid = decodeGrid(payload, coding, shape, this.#frequencies(pointCode), this.contexts[pointCode]);
    return { shape, grid, norms: side };
  }

  /** The same of a file's first bytes, and the share of the decisions that was read. */
  readPrefix({ payload, coding, pointCode, side }, latentShape) {
    if (coding !== Coding.CONTEXT) throw new PayloadError(`coding ${coding} has no preview; allowed: 2 (context)`);
    const shape = this.#gridShape(pointCode, latentShape);
    return { shape, norms: side, ...this.contexts[pointCode].decode(payload, shape) };
  }

  /** @returns {Promise<import("../tensors.js").Planes>} */
  async dequantise({ shape: [rows, columns], grid, norms }, id, run) {
    const { data, width } = this.#codebook(id);
    const codes = new Float32Array(grid.length * width);
    grid.forEach((code, place) => codes.set(data.subarray(code * width, (code + 1) * width), place * width));
    const latent = await run(`hyper_decoder_${id}`, { data: codes, shape: [1, rows, columns, width] });
    return scale(
      latent,
      channelRms(latent).map((rms, channel) => RMS[norms[channel]] / Math.max(rms, 1e-8)),
    );
  }

  #frequencies = (id) => this.tensors.get(`frequencies.${id}`).data;
  #gridShape = (id, shape) => shape.map((side) => Math.ceil(side / RATES[id].downsample));

  /** Codes, (K, width). */
  #codebook(id) {
    const { shape, data } = this.tensors.get(`bottleneck.hyper_encoders.${id}.quantizer._codebook.embed`);
    return { size: shape[1], width: shape[2], data };
  }
}

/** The code of the greatest product with a feature. */
function nearest(feature, { size, width, data }) {
  let best = 0;
  let most = -Infinity;
  for (let code = 0; code < size; code++) {
    const product = dot(feature, data, code * width);
    if (product > most) [best, most] = [code, product];
  }
  return best;
}

function dot(one, other, start) {
  let sum = 0;
  for (let place = 0; place < one.length; place++) sum += one[place] * other[start + place];
  return sum;
}
