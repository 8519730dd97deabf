"""What sample scripts share as text: how each runtime loads a network, and how an image becomes a file.

Each is a program for a machine that has numpy and the runtime's own package, nothing of edgegen. `load(part)` takes the
script's settings: file, options, threads, layout, disabled_optimizers, and the names of inputs and outputs in order.
"""

LOADERS = {
    "onnxruntime": '''

def load(part):
    """The network as a function of its inputs by name. Needs: pip install onnxruntime"""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = part["threads"]
    for key, value in part["options"].items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        str(HERE / part["file"]), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=part["disabled_optimizers"],
    )
    return lambda feeds: dict(zip(part["outputs"], session.run(part["outputs"], feeds)))
''',
    "openvino": '''

def load(part):
    """The network as a function of its inputs by name. Needs: pip install openvino"""
    sys.modules.setdefault("openvino_telemetry", None)  # it would report to its maker
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": part["threads"]}
    if "inference_precision" in part["options"]:  # without it, OpenVINO computes in BF16 where the CPU can
        config["INFERENCE_PRECISION_HINT"] = part["options"]["inference_precision"]
    compiled = openvino.Core().compile_model(str(HERE / part["file"]), "CPU", config)

    def run(feeds):
        made = compiled(feeds)
        return {name: np.array(made[name]) for name in part["outputs"]}

    return run
''',
    "tensorrt": '''

def load(part):
    """The network as a function of its inputs by name. Needs the engine that build_engine.py makes on this device."""
    import ctypes

    import tensorrt

    builder = (HERE / part["file"]).parent / "build_engine.py"
    file = builder.with_name("model.engine")
    if not file.exists():
        raise SystemExit(f"no engine yet: run python3 {builder} on this device first")
    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise SystemExit(f"TensorRT {tensorrt.__version__} cannot load {file}: run python3 {builder} again")
    context, cuda = engine.create_execution_context(), cudart()
    shape_of = engine.get_tensor_shape if hasattr(engine, "get_tensor_shape") else engine.get_binding_shape  # 8.2
    arrays = {name: np.empty(tuple(shape_of(name)), np.float32) for name in [*part["inputs"], *part["outputs"]]}
    memory = {name: ctypes.c_void_p() for name in arrays}
    for name, array in arrays.items():
        check(cuda.cudaMalloc(ctypes.byref(memory[name]), ctypes.c_size_t(array.nbytes)))

    def execute():
        if hasattr(context, "execute_async_v3"):
            for name, pointer in memory.items():
                context.set_tensor_address(name, pointer.value)
            return context.execute_async_v3(0)
        return context.execute_v2([memory[name].value for name in sorted(arrays, key=engine.get_binding_index)])

    def copy(name, array, kind):
        pair = (memory[name], array.ctypes.data_as(ctypes.c_void_p))
        check(cuda.cudaMemcpy(*(pair if kind == 1 else pair[::-1]), ctypes.c_size_t(array.nbytes), kind))

    def run(feeds):
        for name in part["inputs"]:
            copy(name, np.ascontiguousarray(feeds[name], np.float32), 1)  # host to device
        if not execute():
            raise SystemExit("TensorRT could not run the engine")
        check(cuda.cudaDeviceSynchronize())
        for name in part["outputs"]:
            copy(name, arrays[name], 2)  # device to host
        return {name: arrays[name].copy() for name in part["outputs"]}

    return run


def cudart():
    """The CUDA runtime, which moves the arrays."""
    import ctypes

    for name in ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SystemExit("libcudart.so was not found: add CUDA's lib64 folder to LD_LIBRARY_PATH")


def check(status):
    if status:
        raise SystemExit(f"CUDA answers with error {status}")
''',
    "litert": '''

def load(part):
    """The network as a function of its inputs by name. Needs: pip install ai-edge-litert"""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(HERE / part["file"]), num_threads=part["threads"] or None)
    interpreter.allocate_tensors()
    invoke = interpreter.get_signature_runner()

    def last(name):
        """Whether the file has the channels of this image last."""
        return part["layout"].get(name) == "NHWC"

    def run(feeds):
        given = {name: feeds[name].transpose(0, 2, 3, 1) if last(name) else feeds[name] for name in part["inputs"]}
        made = invoke(**{f"args_{i}": np.ascontiguousarray(given[name]) for i, name in enumerate(part["inputs"])})
        found = {name: made[f"output_{i}"] for i, name in enumerate(part["outputs"])}
        return {name: y.transpose(0, 3, 1, 2) if last(name) else y for name, y in found.items()}

    return run
''',
    "executorch": '''

def load(part):
    """The network as a function of its inputs by name. Needs: pip install executorch"""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(HERE / part["file"])).load_method("forward")

    def run(feeds):
        given = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in part["inputs"]]
        return dict(zip(part["outputs"], (made.numpy().copy() for made in method.execute(given))))

    return run
''',
    "ncnn": '''

def load(part):
    """The network as a function of its inputs by name. Needs: pip install ncnn"""
    import ncnn

    net, file = ncnn.Net(), HERE / part["file"]
    net.opt.num_threads = part["threads"] or 1
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
        setattr(net.opt, "use_" + name, False)
    if net.load_param(str(file)) or net.load_model(str(file.with_suffix(".bin"))):
        raise SystemExit(f"ncnn cannot load {file}")

    def run(feeds):
        made = {}
        with net.create_extractor() as extractor:
            for own, name in zip(net.input_names(), part["inputs"]):  # ncnn has no batch axis
                extractor.input(own, ncnn.Mat(np.ascontiguousarray(feeds[name][0], np.float32)).clone())
            for own, name, shape in zip(net.output_names(), part["outputs"], part["output_shapes"]):
                code, y = extractor.extract(own)
                if code:
                    raise SystemExit(f"ncnn could not run the network: {code}")
                made[name] = np.array(y).reshape(shape)
        return made

    return run
''',
}

WRITE_PNG = '''

def write_png(file, image):
    """A PNG file of uint8 (H, W, C) without any library."""
    height, width, channels = image.shape
    if channels not in (1, 3):
        raise SystemExit(f"the output has {channels} channels, which is no picture; give --out FILE.npy")
    rows = b"".join(b"\\0" + row.tobytes() for row in image)
    with open(file, "wb") as out:
        out.write(b"\\x89PNG\\r\\n\\x1a\\n")
        header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            out.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
'''

PACKAGES = {"litert": "ai-edge-litert"}
"""What pip calls a runtime's package, where it is not the runtime's name."""


def loader(runtime: str) -> str:
    """Text of the script's `load` for a runtime; that of ONNX Runtime, on model.onnx, for one that has none."""
    return LOADERS.get(runtime, LOADERS["onnxruntime"])
