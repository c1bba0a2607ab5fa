// Named errors of `.oscar` files: whatever the bytes, reading a file ends in a right result or in one of these.

/** A file that cannot be decoded, or a container that cannot be written. */
export class BitstreamError extends Error {
  get name() {
    return this.constructor.name;
  }
}

/** The file does not begin with the magic number. */
export class NotAnOscarFileError extends BitstreamError {}

/** The file has a format version that this program does not know. */
export class UnsupportedVersionError extends BitstreamError {}

/** The file ends too early. */
export class TruncatedFileError extends BitstreamError {}

/** The bytes are not those that were written. */
export class ChecksumError extends BitstreamError {}

/** A header field has a value that is not allowed. */
export class HeaderError extends BitstreamError {}

/** The file was written with other weights than those at hand. */
export class WrongModelError extends BitstreamError {}

/** The file names a rate point that does not exist or that the model lacks. */
export class UnknownRateError extends BitstreamError {}

/** The coded symbols do not fit the header or the tables. */
export class PayloadError extends BitstreamError {}
