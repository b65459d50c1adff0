/** A heat map: any number of cells on a canvas that scrolls under its labels, with the shared selection drawn on it. */

import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { draw, layOut, strongest } from "./canvas.js";
import { gradient, theme } from "./colours.js";
import { html } from "./html.js";
import { keys } from "./keyboard.js";
import { useWidth } from "./room.js";

/**
 * Draws values by row and column.
 *
 * - `rows`, `columns`: `labels`; `axes`, those of the selection that a place is on, the first of them marked; `first`,
 *   the number of the first place (0)
 * - `value(row, column)`, another function when the values are others
 * - `bound`, the ends of the colours; `colours`, a palette's name
 * - `text(row, column)`, `isBold(row, column)`: what is written in a cell
 * - `describe(row, column)`: what is said of a cell under the pointer or the keyboard, in lines
 * - `unit`: what a value is, for the legend
 * - `cell`: least `width` and `height`, greatest width `most`; without `height`, cells are square
 * - `most`: the greatest height of the drawing; `opensAtEnd`: whether the last row and column are in view at first
 */
export function HeatMap({ label, selection, most = 640, opensAtEnd = false, unit, describe, ...map }) {
  const scroller = useRef(null), canvas = useRef(null);
  const width = useWidth(scroller);
  const [isHere, setHere] = useState(false);
  const layout = layOut({ ...map, view: { width, height: most } });
  const view = {
    width: Math.min(width, Math.ceil(layout.total.width)),
    height: Math.min(most, Math.ceil(layout.total.height)),
  };
  const { scroll, onScroll } = useScroll(scroller, { map, layout, view, opensAtEnd, picked: selection.picked.value });
  useLayoutEffect(() => {
    if (width) draw(canvas.current, { layout, map, scroll, view });
  }, [width, scroll, theme.value, map.value, layout.width, layout.height, most]);

  const shown = selection.shown.value;
  const row = placeOn(map.rows, shown), column = placeOn(map.columns, shown);
  const under = ({ clientX, clientY }) => {
    const box = canvas.current.getBoundingClientRect();
    const c = Math.floor((clientX - box.left - layout.left + scroll.left) / layout.width);
    const r = Math.floor((clientY - box.top - layout.top + scroll.top) / layout.height);
    const isIn = clientX - box.left >= layout.left && clientY - box.top >= layout.top;
    if (!isIn || r >= map.rows.labels.length || c >= map.columns.labels.length) return {};
    return places(map, strongest(map, layout, r, c));
  };
  const point = (event) => {
    setHere(true);
    selection.point(under(event));
  };
  const leave = () => {
    setHere(false);
    selection.leave();
  };
  const onKeyDown = keys({
    ArrowUp: () => selection.step(map.rows.axes, -1),
    ArrowDown: () => selection.step(map.rows.axes, 1),
    ArrowLeft: () => selection.step(map.columns.axes, -1),
    ArrowRight: () => selection.step(map.columns.axes, 1),
  });

  const lines = row === undefined || column === undefined ? [] : describe(row, column);
  const x = layout.left + column * layout.width - scroll.left, y = layout.top + row * layout.height - scroll.top;
  return html`<div class="heatmap">
    <div class="scroller" ref=${scroller} style=${{ height: `${view.height}px` }}
        tabindex="0" role="img" aria-label=${[label, ...lines].join(". ")}
        onScroll=${onScroll}
        onPointerMove=${point} onPointerLeave=${leave} onClick=${(event) => selection.pick(under(event))}
        onFocus=${() => setHere(true)} onBlur=${() => setHere(false)} onKeyDown=${onKeyDown}>
      <div style=${sized(layout.total)}>
        <div class="window" style=${sized(view)}>
          <canvas ref=${canvas}></canvas>
          <${Mark} side="top" extent="height" from=${y} size=${layout.height} least=${layout.top} most=${view.height} />
          <${Mark} side="left" extent="width" from=${x} size=${layout.width} least=${layout.left} most=${view.width} />
        </div>
      </div>
    </div>
    <div class="over" style=${sized(view)}>
      ${isHere && lines.length > 0 && html`<${Note} lines=${lines} x=${x} y=${y} layout=${layout} view=${view} />`}
    </div>
    ${unit && html`<${Legend} bound=${map.bound} colours=${map.colours} unit=${unit} />`}
  </div>`;
}

/** Scrolls a map to its end when it opens, if asked, and to what is picked whenever that changes. */
function useScroll(scroller, { map, layout, view, opensAtEnd, picked }) {
  const [scroll, setScroll] = useState({ left: 0, top: 0 });
  const isThere = view.width > 0;
  useLayoutEffect(() => {
    if (opensAtEnd && isThere) scroller.current.scrollTo(layout.total.width, layout.total.height);
  }, [opensAtEnd, isThere, map.rows.labels.length, map.columns.labels.length]);
  useLayoutEffect(() => {
    const { scrollTop: top, scrollLeft: left } = scroller.current;
    scroller.current.scrollTo({
      top: inView(placeOn(map.rows, picked), layout.height, top, view.height - layout.top),
      left: inView(placeOn(map.columns, picked), layout.width, left, view.width - layout.left),
    });
  }, [picked, isThere]);
  return { scroll, onScroll: ({ target }) => setScroll({ left: target.scrollLeft, top: target.scrollTop }) };
}

/** A band over a row or a column, from one side of the map; nothing where there is no such row in view. */
function Mark({ side, extent, from, size, least, most }) {
  const start = Math.max(from, least), length = Math.min(from + size, most) - start;
  if (!(length > 0)) return null;
  return html`<i class="mark ${side}" style=${{ [side]: `${start}px`, [extent]: `${Math.max(length, 2)}px` }}></i>`;
}

/** Which colours the ends of the values have. */
function Legend({ bound: [low, high], colours, unit }) {
  const written = (value) => String(Number(value.toPrecision(2))).replace("-", "−");
  const ground = { background: gradient(colours) };
  return html`<p class="legend">${written(low)}<i style=${ground}></i>${written(high)} ${unit}</p>`;
}

/** What is said of a cell: below it, or above where there is more room; it is half as wide as the map at most. */
function Note({ lines, x, y, layout, view }) {
  const side = { left: `${Math.min(x, view.width / 2)}px` };
  const end = y < view.height / 2 ? { top: `${y + layout.height + 6}px` } : { bottom: `${view.height - y + 6}px` };
  return html`<div class="note-card" role="status" style=${{ ...side, ...end }}>
    ${lines.map((line) => html`<p>${line}</p>`)}
  </div>`;
}

/** Returns how far a map is scrolled so that a place is in view: as far as it is, if the place is there already. */
function inView(place, size, scrolled, room) {
  if (place === undefined) return scrolled;
  return Math.min(Math.max(scrolled, (place + 1) * size - room), place * size);
}

const sized = ({ width, height }) => ({ width: `${width}px`, height: `${height}px` });

function placeOn({ axes, labels, first = 0 }, shown) {
  const at = (shown[axes[0]] ?? NaN) - first;
  return at >= 0 && at < labels.length ? at : undefined;
}

function places({ rows, columns }, { row, column }) {
  const named = ({ axes, first = 0 }, at) => axes.map((axis) => [axis, at + first]);
  return Object.fromEntries([...named(columns, column), ...named(rows, row)]);
}
