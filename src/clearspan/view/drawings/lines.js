/** Lines of numbers over the places of one axis. */

import { useRef } from "preact/hooks";
import { scaleLinear } from "d3-scale";
import { line } from "d3-shape";
import { html } from "./html.js";
import { keys } from "./keyboard.js";
import { useWidth } from "./room.js";

const MARGIN = { left: 40, right: 56, top: 12, bottom: 26 };

/**
 * Draws `series`, each a `name` and `values`, over `places`: `labels`, `axes` and `first` as in a heat map.
 * `bound` has the ends of the upright axis.
 */
export function Lines({ label, series, places, bound, selection, height = 190 }) {
  const holder = useRef(null);
  const width = useWidth(holder);
  const count = places.labels.length, first = places.first ?? 0;
  const x = scaleLinear([0, Math.max(1, count - 1)], [MARGIN.left, Math.max(MARGIN.left + 1, width - MARGIN.right)]);
  const y = scaleLinear(bound, [height - MARGIN.bottom, MARGIN.top]);
  const curve = line((_, i) => x(i), (value) => y(value)).defined(Number.isFinite);
  const at = (selection.shown.value[places.axes[0]] ?? NaN) - first;
  const step = Math.ceil((count * 58) / Math.max(width, 1));
  const named = (i) => Object.fromEntries(places.axes.map((axis) => [axis, i + first]));
  const under = (event) => named(Math.round(x.invert(event.clientX - holder.current.getBoundingClientRect().left)));
  const onKeyDown = keys({
    ArrowLeft: () => selection.step(places.axes, -1),
    ArrowRight: () => selection.step(places.axes, 1),
  });
  const isThere = at >= 0 && at < count;
  const written = (value) => (Number.isFinite(value) ? value.toFixed(3) : "none");
  const told = series.map(({ name, values }) => `${name} ${written(values[at])}`).join(", ");
  return html`<div class="lines" ref=${holder}>
    <svg width=${width} height=${height} tabindex="0" role="img"
        aria-label=${isThere ? `${label}. ${places.labels[at]}: ${told}` : label}
        onPointerMove=${(event) => selection.point(under(event))} onPointerLeave=${() => selection.leave()}
        onClick=${(event) => selection.pick(under(event))} onKeyDown=${onKeyDown}>
      ${y.ticks(4).map((tick) => html`<g key=${tick} class="tick">
        <line x1=${MARGIN.left} x2=${width - MARGIN.right} y1=${y(tick)} y2=${y(tick)} />
        <text x=${MARGIN.left - 8} y=${y(tick)} dy="0.32em" text-anchor="end">${tick}</text>
      </g>`)}
      ${places.labels.map((name, i) => i % step === 0 && html`
        <text class="tick" x=${x(i)} y=${height - 8} text-anchor="middle">${name}</text>`)}
      ${isThere && html`
        <line class="here" x1=${x(at)} x2=${x(at)} y1=${MARGIN.top} y2=${height - MARGIN.bottom} />`}
      ${series.map(({ name, values }) => html`<g key=${name} class="series">
        <path d=${curve(values)} />
        ${values.map((value, i) => Number.isFinite(value) && html`
          <circle class=${i === at ? "at" : ""} cx=${x(i)} cy=${y(value)} r=${i === at ? 4.5 : 2.5} />`)}
        ${Number.isFinite(values[at]) && html`
          <text x=${x(at) + 9} y=${y(values[at])} dy="0.32em">${written(values[at])}</text>`}
      </g>`)}
    </svg>
  </div>`;
}
