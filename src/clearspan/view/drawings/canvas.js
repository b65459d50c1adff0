/** Cells with labels on a canvas: where each lies, and how they are drawn. */

import { colourOf, palette, style } from "./colours.js";

const LABEL_STEP = 13;
const MOST_LABEL = 100;
const SMALLEST_BLOCK = 3;

/**
 * Returns where everything lies.
 *
 * `rows` and `columns` have `labels`; `cell` has the least `width` and `height` and, in `most`, the greatest; `view` is
 * the room on the page. A map smaller than its room is stretched, a larger one is scrolled. Without a height, cells are
 * square.
 */
export function layOut({ rows, columns, cell, view }) {
  const left = Math.min(widest(rows.labels), MOST_LABEL, view.width / 3) + 10;
  const upright = Math.min(widest(columns.labels), MOST_LABEL) + 10;
  const down = cell.height ? Infinity : (view.height - upright) / rows.labels.length;
  const width = stretched(cell.width, Math.min(down, (view.width - left) / columns.labels.length), cell.most);
  const isUpright = width < widest(columns.labels) + 6;
  const top = isUpright ? upright : 20;
  const height = cell.height ?? width;
  const total = { width: left + width * columns.labels.length, height: top + height * rows.labels.length };
  return { left, top, width, height, isUpright, total };
}

const stretched = (least, room, most = least) => Math.max(least, Math.min(room, most));

const widths = new WeakMap();

/** Returns the width of the widest label, in pixels; that of `0` in the page's monospace is nearly that of any. */
function widest(labels) {
  if (!widths.has(labels)) {
    const ruler = document.createElement("canvas").getContext("2d");
    ruler.font = font();
    widths.set(labels, Math.max(...labels.map((label) => ruler.measureText(label).width)));
  }
  return widths.get(labels);
}

const font = (weight = 400) => `${weight} 11px ${style("--mono")}`;

/** Draws the part of a map that is in view. `scroll` is how far it is scrolled, `view` how large the canvas is. */
export function draw(canvas, { layout, map, scroll, view }) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(view.width * ratio);
  canvas.height = Math.round(view.height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.textBaseline = "middle";
  const { left, top, width, height } = layout;
  const across = inView(scroll.left, view.width - left, width, map.columns.labels.length);
  const down = inView(scroll.top, view.height - top, height, map.rows.labels.length);
  context.save();
  context.beginPath();
  context.rect(left, top, view.width - left, view.height - top);
  context.clip();
  context.translate(left - scroll.left, top - scroll.top);
  drawCells(context, layout, map, down, across);
  context.restore();
  context.fillStyle = style("--quiet");
  context.font = font();
  drawRowLabels(context, layout, map.rows.labels, down, scroll.top, view);
  drawColumnLabels(context, layout, map.columns.labels, across, scroll.left, view);
}

/** Returns the first place in view, the end of those in view, and how many are drawn as one. */
function inView(offset, room, size, count) {
  const pool = pooled(size);
  const first = Math.floor(Math.max(0, offset / size) / pool) * pool;
  return { first, end: Math.min(count, Math.ceil((offset + room) / size)), pool };
}

/** Returns how many places of a size are drawn as one, so that each can be seen. */
const pooled = (size) => Math.max(1, Math.ceil(SMALLEST_BLOCK / size));

/** Returns the cell that stands for all that are drawn as one with it: that whose value is furthest from 0. */
export function strongest({ rows, columns, value }, layout, row, column) {
  const down = pooled(layout.height), across = pooled(layout.width);
  const top = Math.floor(row / down) * down, left = Math.floor(column / across) * across;
  let found = { row, column, value: value(row, column) };
  for (let r = top; r < Math.min(top + down, rows.labels.length); r++) {
    for (let c = left; c < Math.min(left + across, columns.labels.length); c++) {
      const one = value(r, c);
      if (Number.isFinite(one) && !(Math.abs(one) <= Math.abs(found.value))) found = { row: r, column: c, value: one };
    }
  }
  return found;
}

function drawCells(context, layout, map, down, across) {
  const { width, height } = layout, { bound, text, isBold } = map;
  const shades = palette(map.colours);
  const gap = Math.min(width, height) >= 8 ? 1 : 0;
  for (let row = down.first; row < down.end; row += down.pool) {
    for (let column = across.first; column < across.end; column += across.pool) {
      const shade = colourOf(strongest(map, layout, row, column).value, bound, shades);
      if (!shade) continue;
      const x = column * width, y = row * height;
      context.fillStyle = shade.ground;
      context.fillRect(x, y, width * across.pool - gap, height * down.pool - gap);
      if (!text) continue;
      context.fillStyle = shade.ink;
      context.font = font(isBold(row, column) ? 700 : 400);
      context.fillText(cut(text(row, column), width - 10), x + 5, y + height / 2);
    }
  }
}

/** Returns as many of a text's first characters as have room, at 6.7 pixels each. */
function cut(text, room) {
  const most = Math.floor(room / 6.7);
  return text.length <= most ? text : `${text.slice(0, Math.max(0, most - 1))}…`;
}

function drawRowLabels(context, { left, top, height }, labels, down, offset, view) {
  const step = Math.max(1, Math.ceil(LABEL_STEP / height));
  context.textAlign = "right";
  for (let row = Math.ceil(down.first / step) * step; row < down.end; row += step) {
    const y = top + (row + 0.5) * height - offset;
    if (y >= top && y < view.height) context.fillText(cut(labels[row], left), left - 8, y);
  }
}

function drawColumnLabels(context, { left, top, width, isUpright }, labels, across, offset, view) {
  const step = Math.max(1, Math.ceil(LABEL_STEP / width));
  context.textAlign = isUpright ? "left" : "center";
  for (let column = Math.ceil(across.first / step) * step; column < across.end; column += step) {
    const x = left + (column + 0.5) * width - offset;
    if (x < left || x >= view.width) continue;
    context.save();
    context.translate(x, isUpright ? top - 6 : top - 10);
    if (isUpright) context.rotate(-Math.PI / 2);
    context.fillText(cut(labels[column], isUpright ? MOST_LABEL : width), 0, 0);
    context.restore();
  }
}
