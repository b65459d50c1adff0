/** How much room a drawing has on the page. */

import { useLayoutEffect, useState } from "preact/hooks";

/** Returns the width of an element in pixels, as it is now and whenever it changes; 0 before the element is there. */
export function useWidth(element) {
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const observer = new ResizeObserver(() => setWidth(element.current.clientWidth));
    setWidth(element.current.clientWidth);
    observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return width;
}
