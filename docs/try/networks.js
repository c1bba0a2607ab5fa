// The networks of a model: ONNX graphs that ONNX Runtime runs in WebAssembly on one thread.

/** Files that graphs point to for their weights, as far as a model has them. */
const WEIGHTS = /\.safetensors$|\.data$/;

export class Networks {
  #sessions = new Map();

  /**
   * @param {object} ort the module onnxruntime-web
   * @param {Map<string, Uint8Array>} files of the model, by path
   */
  constructor(ort, files) {
    this.ort = ort;
    this.files = files;
  }

  /**
   * Run a graph.
   *
   * @param {string} name of the graph, without its suffix
   * @param {...{data: Float32Array, shape?: number[]}} inputs planes, or arrays with a shape, in the graph's order
   * @returns {Promise<{data: Float32Array, channels: number, height: number, width: number}>} its output
   */
  run = async (name, ...inputs) => {
    const session = await this.#session(name);
    await new Promise((resolve) => setTimeout(resolve)); // messages arrive between networks
    const feeds = inputs.map(({ data, shape, channels, height, width }, place) => [
      session.inputNames[place],
      new this.ort.Tensor("float32", data, shape ?? [1, channels, height, width]),
    ]);
    const { data, dims } = (await session.run(Object.fromEntries(feeds)))[session.outputNames[0]];
    return { data, channels: dims[1], height: dims[2], width: dims[3] };
  };

  #session(name) {
    if (!this.#sessions.has(name)) {
      const externalData = [...this.files]
        .filter(([path]) => WEIGHTS.test(path))
        .map(([path, data]) => ({ path, data }));
      const graph = this.files.get(`${name}.onnx`);
      this.#sessions.set(name, this.ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData }));
    }
    return this.#sessions.get(name);
  }
}
