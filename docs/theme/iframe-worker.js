// Lets the search work on pages that are opened as files. A browser starts no worker for these, so the
// script of a worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.receive(data);
      const script = this.inside.document.createElement("script");
      this.isReady = new Promise((resolve) => (script.onload = resolve));
      script.src = new URL(url, location.href);
      this.inside.document.head.append(script);
    }

    async postMessage(data) {
      await this.isReady;
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }

    receive(data) {
      const event = new MessageEvent("message", { data });
      this.onmessage?.(event);
      this.dispatchEvent(event);
    }

    terminate() {
      this.inside.frameElement.remove();
    }
  };
}
