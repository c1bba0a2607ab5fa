// SHA-256 by the platform, which browsers have on pages by https or from this machine.

/** @param {...Uint8Array} parts @returns {Promise<Uint8Array>} */
export async function sha256(...parts) {
  if (!globalThis.crypto?.subtle)
    throw new Error("this browser computes SHA-256 on pages by https or from localhost only");
  return new Uint8Array(await crypto.subtle.digest("SHA-256", await new Blob(parts).arrayBuffer()));
}

/** Integers as int32, little-endian. @returns {Uint8Array} */
export function int32Bytes(values) {
  const bytes = new Uint8Array(4 * values.length);
  const view = new DataView(bytes.buffer);
  values.forEach((value, place) => view.setInt32(4 * place, value, true));
  return bytes;
}

export const toHex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
export const fromHex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
