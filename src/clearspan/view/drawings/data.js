/** Reads what `packing.py` wrote: plain data in which some values are tensors of 8 or 16 bits. */

/** Numbers with axes, read where they lie. */
export class Tensor {
  constructor({ shape, low, high, bits, isTriangular, offset }, buffer) {
    const length = count(isTriangular ? shape.slice(0, -2) : shape) * (isTriangular ? triangle(shape.at(-1)) : 1);
    this.shape = shape;
    this.low = low;
    this.step = (high - low) / (2 ** bits - 2);
    this.missing = 2 ** bits - 1;
    this.isTriangular = isTriangular;
    this.codes = bits === 8 ? new Uint8Array(buffer, offset, length) : new Uint16Array(buffer, offset, length);
  }

  /** Returns the value at one place, which names an index on each axis; NaN where there is none. */
  at(...place) {
    let column = 0;
    if (this.isTriangular) {
      column = place.pop();
      if (column > place.at(-1)) return this.low;
      column += triangle(place.pop());
    }
    let index = 0;
    for (let axis = 0; axis < place.length; axis++) index = index * this.shape[axis] + place[axis];
    if (this.isTriangular) index = index * triangle(this.shape.at(-1)) + column;
    const code = this.codes[index];
    return code === this.missing ? NaN : this.low + code * this.step;
  }

  /** Returns the values on the last axis, at a place on the others. */
  row(...place) {
    return Array.from({ length: this.shape.at(-1) }, (_, i) => this.at(...place, i));
  }
}

const triangle = (size) => (size * (size + 1)) / 2;
const count = (shape) => shape.reduce((product, size) => product * size, 1);

/** Returns the document that a buffer holds. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const text = new TextDecoder().decode(new Uint8Array(buffer, 4, length));
  const body = 4 + length;
  return JSON.parse(text, (_, value) => {
    const kept = value?.$tensor;
    return kept ? new Tensor({ ...kept, offset: body + kept.offset }, buffer) : value;
  });
}
