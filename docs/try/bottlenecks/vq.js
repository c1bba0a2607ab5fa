// The paper's bottleneck: one hyper-encoder per rate, indices in files, norms beside them (`oscar/bottlenecks/vq.py`).
//
// A vector of the codebook space stands for an index, or for a cell of n x n indices: then it is the sum of one code
// from each of n * n codebooks, row by row (`oscar/bottlenecks/residual_vq.py`). At a border a cell may lack indices.

import { Coding } from "../bitstream/container.js";
import { ContextModel, decodeGrid, encodeGrid } from "../bitstream/context.js";
import { sha256, int32Bytes } from "../bitstream/digest.js";
import { PayloadError, WrongModelError } from "../bitstream/errors.js";
import { RMS, quantiseRms } from "../bitstream/norms.js";
import { RATES } from "../bitstream/rates.js";
import { channelRms, pad, resize, scale } from "../tensors.js";

const DEFAULT_RATE = 4; // 0.0625
const BEAM = 16;

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
   * @param {{rates: number[], stages?: Record<string, number>}} config of the bottleneck
   */
  constructor(tensors, config) {
    this.tensors = tensors;
    this.stages = config.stages ?? {};
    /** Ids from small to large files. */
    this.points = [...config.rates].sort((one, other) => RATES[one].bpp - RATES[other].bpp);
    this.defaultPoint = this.points.includes(DEFAULT_RATE) ? DEFAULT_RATE : this.points.at(-1);
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
    const { downsample } = RATES[id];
    const cell = this.#cell(id);
    const features = await run(`hyper_encoder_${id}`, pad(latent, downsample * cell)); // (1, rows, columns, D)
    const shape = [latent.height / downsample, latent.width / downsample];
    const norms = Uint8Array.from(channelRms(latent), quantiseRms);
    return { shape, grid: this.#search(features.data, shape, id), norms };
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
    const { data, stages: _, size, width } = this.#codebooks(id);
    const cell = this.#cell(id);
    const cells = [Math.ceil(rows / cell), Math.ceil(columns / cell)];
    const sums = new Float32Array(cells[0] * cells[1] * width);
    grid.forEach((code, position) => {
      const [row, column] = [Math.floor(position / columns), position % columns];
      const to = (Math.floor(row / cell) * cells[1] + Math.floor(column / cell)) * width;
      const from = (this.#stage(row, column, cell) * size + code) * width;
      for (let place = 0; place < width; place++) sums[to + place] += data[from + place];
    });
    const found = await run(`hyper_decoder_${id}`, { data: sums, shape: [1, ...cells, width] });
    const { downsample } = RATES[id];
    const latent = resize(found, rows * downsample, columns * downsample);
    return scale(
      latent,
      channelRms(latent).map((rms, channel) => RMS[norms[channel]] / Math.max(rms, 1e-8)),
    );
  }

  #cell = (id) => Math.sqrt(this.stages[id] ?? 1);
  #stage = (row, column, cell) => (row % cell) * cell + (column % cell);
  #frequencies = (id) => this.tensors.get(`frequencies.${id}`).data;
  #gridShape = (id, shape) => shape.map((side) => Math.ceil(side / RATES[id].downsample));

  /** Codes, (stages, K, width), and what the search adds to the distance of each. */
  #codebooks(id) {
    const prefix = `bottleneck.hyper_encoders.${id}.quantizer.`;
    const isOne = this.#cell(id) === 1;
    const { shape, data } = this.tensors.get(prefix + (isOne ? "_codebook.embed" : "codebook"));
    const [stages, size, width] = shape;
    return { stages, size, width, data, penalty: isOne ? null : this.tensors.get(`${prefix}penalty`).data };
  }

  /** Indices of a grid whose cells have these features, of unit norm. */
  #search(features, [rows, columns], id) {
    const books = this.#codebooks(id);
    const cell = this.#cell(id);
    const grid = new Uint16Array(rows * columns);
    for (let top = 0, start = 0; top < rows; top += cell) {
      for (let left = 0; left < columns; left += cell, start += books.width) {
        const feature = features.subarray(start, start + books.width);
        const isThere = (stage) => top + Math.floor(stage / cell) < rows && left + (stage % cell) < columns;
        const chosen = books.stages === 1 ? [nearest(feature, books)] : beamSearch(feature, books, isThere);
        chosen.forEach((code, stage) => {
          if (isThere(stage)) grid[(top + Math.floor(stage / cell)) * columns + left + (stage % cell)] = code;
        });
      }
    }
    return grid;
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

/** A code of each stage, whose sum, penalties included, is near a feature; stages that are not there add nothing. */
function beamSearch(feature, { stages, size, width, data, penalty }, isThere) {
  let beams = [{ codes: [], residual: feature, spent: 0 }];
  for (let stage = 0; stage < stages; stage++) {
    if (!isThere(stage)) {
      beams.forEach((beam) => beam.codes.push(0));
      continue;
    }
    const found = beams.flatMap(({ residual, spent }, beam) =>
      Array.from({ length: size }, (_, code) => {
        const row = stage * size + code;
        let error = spent + penalty[row];
        for (let place = 0; place < width; place++) error += (residual[place] - data[row * width + place]) ** 2;
        return { beam, code, error };
      }),
    );
    found.sort((one, other) => one.error - other.error);
    beams = found.slice(0, BEAM).map(({ beam, code, error }) => {
      const { codes, residual, spent } = beams[beam];
      const row = stage * size + code;
      const rest = residual.map((value, place) => value - data[row * width + place]);
      return { codes: [...codes, code], residual: rest, spent: spent + penalty[row], error };
    });
  }
  return beams[0].codes;
}

function dot(one, other, start) {
  let sum = 0;
  for (let place = 0; place < one.length; place++) sum += one[place] * other[start + place];
  return sum;
}
