// Tensors of a safetensors file by name: a header of JSON behind its length in 8 bytes, then the numbers.

const TYPES = { I8: Int8Array, U8: Uint8Array, I16: Int16Array, I32: Int32Array, F16: Uint16Array, F32: Float32Array };

/** @typedef {{shape: number[], data: Int8Array | Uint8Array | Int16Array | Int32Array | Float32Array}} Tensor */

export class Tensors {
  #bytes;
  #start;
  #header;

  /** @param {Uint8Array} bytes of the file */
  constructor(bytes) {
    const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
    this.#bytes = bytes;
    this.#start = 8 + length;
    this.#header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, this.#start)));
  }

  has(name) {
    return name in this.#header;
  }

  /** A tensor; float16 comes as float32. @returns {Tensor} */
  get(name) {
    const entry = this.#header[name];
    if (!entry) throw new Error(`the model lacks ${name}`);
    const [from, to] = entry.data_offsets.map((offset) => this.#start + offset);
    const data = new TYPES[entry.dtype](this.#bytes.slice(from, to).buffer);
    return { shape: entry.shape, data: entry.dtype === "F16" ? Float32Array.from(data, fromHalf) : data };
  }
}

/** The number that the bits of a float16 stand for. */
function fromHalf(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
