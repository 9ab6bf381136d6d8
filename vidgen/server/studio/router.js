// Addresses behind the #: which view is shown, and where the focus goes.

let onroute = null;
let isFirst = true;

/** The view and its arguments: "#/clip/ID" is ["clip", "ID"]. */
export function route() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean);
  return parts.length ? parts.map(decodeURIComponent) : ["clips"];
}

/** Call back now and whenever the address changes. */
export function startRouter(callback) {
  onroute = callback;
  addEventListener("hashchange", () => {
    if (location.hash === "#main") return; // the skip link's
    onroute(route(), false);
  });
  onroute(route(), isFirst);
  isFirst = false;
}

/** Go to an address. */
export function go(...parts) {
  location.hash = `#/${parts.map(encodeURIComponent).join("/")}`;
}

/** Change the address and leave the focus and the place where they are. */
export function goQuietly(...parts) {
  history.replaceState(null, "", `#/${parts.map(encodeURIComponent).join("/")}`);
  onroute(route(), true);
}
