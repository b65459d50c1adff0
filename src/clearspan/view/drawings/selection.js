/** One selection that all drawings of a page share. */

import { computed, effect, signal } from "@preact/signals";

/**
 * Which place is looked at on each axis: `position` (a token), `target` (the token whose prediction is explained),
 * `layer` and `head`. What is under the pointer is shown in place of what was picked, for as long as it is there.
 */
export class Selection {
  /** `sizes` has the number of places on each axis, `start` what is picked at first; null for none. */
  constructor(sizes, start) {
    this.sizes = sizes;
    this.start = start;
    this.picked = signal(start);
    this.pointed = signal({});
    this.shown = computed(() => ({ ...this.picked.value, ...this.pointed.value }));
  }

  point(places) {
    this.pointed.value = this.valid(places);
  }

  leave() {
    this.pointed.value = {};
  }

  pick(places) {
    this.picked.value = { ...this.picked.peek(), ...this.valid(places) };
  }

  /** Moves by a number of places on an axis, from what is shown to what is then picked. */
  step(axes, by) {
    const last = this.sizes[axes[0]] - 1;
    const at = Math.min(Math.max((this.shown.peek()[axes[0]] ?? (by > 0 ? -1 : last + 1)) + by, 0), last);
    this.leave();
    this.pick(Object.fromEntries(axes.map((axis) => [axis, at])));
  }

  /** Picks these places and, on the other axes, those of the start. */
  open(places) {
    this.leave();
    this.picked.value = { ...this.start, ...this.valid(places) };
  }

  clear() {
    this.open({});
  }

  /** Returns those places that are on their axes. */
  valid(places) {
    const isThere = ([axis, at]) => Number.isInteger(at) && at >= 0 && at < this.sizes[axis];
    return Object.fromEntries(Object.entries(places).filter(isThere));
  }
}

/** Keeps what is picked in the address, after `#`, and takes it from there when the page opens or it is edited. */
export function keepInAddress(selection) {
  const read = () => {
    const entries = [...new URLSearchParams(location.hash.slice(1))].map(([axis, at]) => [axis, Number(at)]);
    selection.open(Object.fromEntries(entries));
  };
  const write = () => {
    const changed = Object.entries(selection.picked.value).filter(([axis, at]) => at !== selection.start[axis]);
    const hash = new URLSearchParams(changed).toString();
    if (hash === location.hash.slice(1)) return;
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname);
  };
  read();
  addEventListener("hashchange", read);
  return effect(write);
}
