// The `.oscar` container: a header of at most 16 bytes for images up to 16384x16384, and the coded symbols.
// The table of its fields is docs/format.md; the reference is oscar/bitstream/container.py.

import {
  ChecksumError,
  HeaderError,
  NotAnOscarFileError,
  PayloadError,
  TruncatedFileError,
  UnknownRateError,
  UnsupportedVersionError,
} from "./errors.js";
import { RATES, gridShape, packedLength } from "./rates.js";

/** What a payload holds, and how; the number is stored in files. */
export const Coding = { PACKED: 0, TABLE: 1, CONTEXT: 2, HYPERPRIOR: 3, EXTERNAL: 7 };
export const MAX_QUALITY = 4095;

const VERSION = 1;
const LATENT_CHANNELS = 4;
const MAX_SIDE = 65536;
const CHECKSUM_BYTES = 3;
const VARINT_BYTES = 3;

/**
 * @typedef {object} Container
 * @property {number} coding how the payload holds the symbols
 * @property {number} pointCode rate id with codings of indices, else 0 to 4095
 * @property {number} modelTag fingerprint of the weights that decoding depends on, 16 bits
 * @property {number} width of the image in pixels
 * @property {number} height likewise
 * @property {Uint8Array} side codes of the latent norms with codings of indices, else empty
 * @property {number | null} timestep code of the image's own timestep, null where the operating point determines it
 * @property {Uint8Array} payload the coded symbols
 */

export const hasIndices = (coding) => coding <= Coding.CONTEXT;

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  for (let bit = 0; bit < 8; bit++) byte = byte & 1 ? (byte >>> 1) ^ 0xedb88320 : byte >>> 1;
  return byte;
});

/** CRC-32 of bytes in several parts. */
export function crc32(...parts) {
  let crc = ~0;
  for (const part of parts) for (const byte of part) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return ~crc >>> 0;
}

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** The bytes of a file. @param {Container} container @returns {Uint8Array} */
export function pack(container) {
  const { coding, pointCode, modelTag, timestep, payload } = check(container);
  const flag = timestep === null ? 0 : 0x80;
  const before = [
    0x05,
    0xc0 | VERSION,
    ...(hasIndices(coding) ? [flag | (coding << 4) | pointCode] : [(coding << 4) | (pointCode >> 8), pointCode & 0xff]),
    modelTag >> 8,
    modelTag & 0xff,
    ...varint(container.width - 1),
    ...varint(container.height - 1),
    ...container.side,
    ...(timestep === null ? [] : [timestep]),
  ];
  const header = [...before, ...checksum(before, payload)];
  const data = new Uint8Array(header.length + payload.length);
  data.set(header);
  data.set(payload, header.length);
  return data;
}

/**
 * Read the bytes of a file. `pack(unpack(data))` is `data` for all that it accepts.
 *
 * @param {Uint8Array} data
 * @param {boolean} whole without it the payload's end may be missing, and damage is not noticed
 * @returns {Container}
 * @throws {BitstreamError} one of its kinds, whatever the bytes, if they are not a whole and undamaged file
 */
export function unpack(data, whole = true) {
  checkMagic(data);
  if (data.length < 6) throw new TruncatedFileError(`file ends in its header: it has ${data.length} bytes`);
  const coding = (data[2] >> 4) & 7;
  const own = data[2] >> 7; // timestep
  const indices = coding !== Coding.HYPERPRIOR && coding !== Coding.EXTERNAL;
  const tagEnd = indices ? 5 : 6;
  const [width, afterWidth] = readVarint(data, tagEnd, "width");
  const [height, afterHeight] = readVarint(data, afterWidth, "height");
  const normsEnd = afterHeight + (indices ? LATENT_CHANNELS : 0);
  const checksumStart = normsEnd + own;
  const headerEnd = checksumStart + CHECKSUM_BYTES;
  if (data.length < headerEnd) {
    throw new TruncatedFileError(`file ends in its header: it has ${data.length} of ${headerEnd} bytes`);
  }
  const payload = data.slice(headerEnd);
  const expected = checksum(data.subarray(0, checksumStart), payload);
  if (whole && expected.some((byte, place) => byte !== data[checksumStart + place])) {
    throw new ChecksumError("checksum does not match: the file is damaged or cut short");
  }
  return check({
    coding,
    pointCode: indices ? data[2] & 0xf : ((data[2] & 0xf) << 8) | data[3],
    modelTag: (data[tagEnd - 2] << 8) | data[tagEnd - 1],
    width: width + 1,
    height: height + 1,
    side: data.slice(afterHeight, normsEnd),
    timestep: own ? data[normsEnd] : null,
    payload,
  });
}

/** @param {Container} container @returns {Container} itself, if its fields are in range and go together */
function check(container) {
  const { coding, pointCode, side, timestep, payload, width, height } = container;
  if (!Object.values(Coding).includes(coding)) {
    throw new HeaderError(`coding ${coding} does not exist; allowed: ${Object.values(Coding).join(", ")}`);
  }
  checkRange("model tag", container.modelTag, 0, 0xffff);
  checkRange("width", width, 1, MAX_SIDE);
  checkRange("height", height, 1, MAX_SIDE);
  if (!hasIndices(coding)) {
    if (timestep !== null) throw new HeaderError(`timestep is ${timestep}; allowed with coding ${coding}: none`);
    if (side.length) throw new HeaderError(`norms have ${side.length} codes; allowed with coding ${coding}: none`);
    checkRange("quality", pointCode, 0, MAX_QUALITY);
    return container;
  }
  const rate = RATES[pointCode];
  if (!rate) throw new UnknownRateError(`rate id ${pointCode} does not exist; allowed: 0 to ${RATES.length - 1}`);
  if (side.length !== LATENT_CHANNELS) {
    throw new HeaderError(`norms have ${side.length} codes; allowed: ${LATENT_CHANNELS}`);
  }
  if (timestep !== null) checkRange("timestep code", timestep, 0, 255);
  const [rows, columns] = gridShape(rate, height, width);
  const longest = packedLength(rows * columns, rate.codebookSize);
  const isPacked = coding === Coding.PACKED;
  if (isPacked ? payload.length !== longest : payload.length >= longest) {
    throw new PayloadError(
      `payload has ${payload.length} bytes; allowed for ${width}x${height} at rate ${rate.bpp.toFixed(4)} with ` +
        `coding ${coding}: ${isPacked ? "" : "fewer than "}${longest}`,
    );
  }
  return container;
}

function checkRange(field, value, smallest, largest) {
  if (!(value >= smallest && value <= largest)) {
    throw new HeaderError(`${field} ${value} is not allowed; allowed: ${smallest} to ${largest}`);
  }
}

function checkMagic(data) {
  if (!data.length) throw new TruncatedFileError("file is empty");
  if (data[0] !== 0x05 || (data.length > 1 && data[1] >> 4 !== 0xc)) {
    throw new NotAnOscarFileError(
      `not an .oscar file: it begins with ${hex(data.subarray(0, 2))}, not with 05c${VERSION}`,
    );
  }
  if (data.length > 1 && (data[1] & 0xf) !== VERSION) {
    throw new UnsupportedVersionError(`format version ${data[1] & 0xf} is not supported; allowed: ${VERSION}`);
  }
}

function checksum(before, payload) {
  const crc = crc32(before, payload);
  return [(crc >> 16) & 0xff, (crc >> 8) & 0xff, crc & 0xff];
}

/** Seven bits a byte, lowest first, the high bit set when more follow. */
const varint = (value) => (value < 0x80 ? [value] : [(value & 0x7f) | 0x80, ...varint(value >> 7)]);

/** The value at `position` and the position after it; a value has one spelling only, the shortest. */
function readVarint(data, position, field) {
  let value = 0;
  for (let offset = 0; offset < VARINT_BYTES; offset++) {
    if (position + offset >= data.length) {
      throw new TruncatedFileError(`file ends in its ${field}: it has ${data.length} bytes`);
    }
    const byte = data[position + offset];
    value |= (byte & 0x7f) << (7 * offset);
    if (byte < 0x80) {
      if (byte === 0 && offset) throw new HeaderError(`${field} ${value + 1} is not written in the fewest bytes`);
      return [value, position + offset + 1];
    }
  }
  throw new HeaderError(`${field} takes more than ${VARINT_BYTES} bytes; allowed: 1 to ${MAX_SIDE} pixels`);
}
