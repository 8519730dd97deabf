"""How a sample script loads a network in each runtime: the text of its `load()`.

Each is a program for a machine that has numpy and the runtime's own package, nothing of edgegen.
"""

LOADERS = {
    "onnxruntime": '''

def load():
    """The network as a function of one array. Needs: pip install onnxruntime"""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = SETTINGS["threads"]
    for key, value in SETTINGS["options"].items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        str(HERE / SETTINGS["file"]), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=SETTINGS["disabled_optimizers"],
    )
    return lambda x: session.run([SETTINGS["output"]], {SETTINGS["input"]: x})[0]
''',
    "openvino": '''

def load():
    """The network as a function of one array. Needs: pip install openvino"""
    sys.modules.setdefault("openvino_telemetry", None)  # it would report to its maker
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": SETTINGS["threads"]}
    if "inference_precision" in SETTINGS["options"]:  # without it, OpenVINO computes in BF16 where the CPU can
        config["INFERENCE_PRECISION_HINT"] = SETTINGS["options"]["inference_precision"]
    compiled = openvino.Core().compile_model(str(HERE / SETTINGS["file"]), "CPU", config)
    return lambda x: compiled({SETTINGS["input"]: x})[SETTINGS["output"]]
''',
    "tensorrt": '''

def load():
    """The network as a function of one array. Needs the engine that build_engine.py makes on this device."""
    import ctypes

    import tensorrt

    builder = (HERE / SETTINGS["file"]).parent / "build_engine.py"
    file = builder.with_name("model.engine")
    if not file.exists():
        raise SystemExit(f"no engine yet: run python3 {builder} on this device first")
    engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(file.read_bytes())
    if engine is None:
        raise SystemExit(f"TensorRT {tensorrt.__version__} cannot load {file}: run python3 {builder} again")
    context, cuda, names = engine.create_execution_context(), cudart(), (SETTINGS["input"], SETTINGS["output"])
    shape_of = engine.get_tensor_shape if hasattr(engine, "get_tensor_shape") else engine.get_binding_shape  # 8.2
    arrays = {name: np.empty(tuple(shape_of(name)), np.float32) for name in names}
    memory = {name: ctypes.c_void_p() for name in names}
    for name, array in arrays.items():
        check(cuda.cudaMalloc(ctypes.byref(memory[name]), ctypes.c_size_t(array.nbytes)))

    def execute():
        if hasattr(context, "execute_async_v3"):
            for name, pointer in memory.items():
                context.set_tensor_address(name, pointer.value)
            return context.execute_async_v3(0)
        return context.execute_v2([memory[name].value for name in sorted(names, key=engine.get_binding_index)])

    def copy(name, array, kind):
        pair = (memory[name], array.ctypes.data_as(ctypes.c_void_p))
        check(cuda.cudaMemcpy(*(pair if kind == 1 else pair[::-1]), ctypes.c_size_t(array.nbytes), kind))

    def run(x):
        copy(names[0], np.ascontiguousarray(x, np.float32), 1)  # host to device
        if not execute():
            raise SystemExit("TensorRT could not run the engine")
        check(cuda.cudaDeviceSynchronize())
        copy(names[1], arrays[names[1]], 2)  # device to host
        return arrays[names[1]].copy()

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

def load():
    """The network as a function of one array. Needs: pip install ai-edge-litert"""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(HERE / SETTINGS["file"]), num_threads=SETTINGS["threads"] or None)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run(x):
        last = SETTINGS["layout"].get(SETTINGS["input"]) == "NHWC"
        interpreter.set_tensor(given, np.ascontiguousarray(x.transpose(0, 2, 3, 1) if last else x))
        interpreter.invoke()
        y = interpreter.get_tensor(made)
        return y.transpose(0, 3, 1, 2) if SETTINGS["layout"].get(SETTINGS["output"]) == "NHWC" else y

    return run
''',
    "executorch": '''

def load():
    """The network as a function of one array. Needs: pip install executorch"""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(HERE / SETTINGS["file"])).load_method("forward")
    return lambda x: method.execute([torch.from_numpy(np.ascontiguousarray(x))])[0].numpy().copy()
''',
    "ncnn": '''

def load():
    """The network as a function of one array. Needs: pip install ncnn"""
    import ncnn

    net, file = ncnn.Net(), HERE / SETTINGS["file"]
    net.opt.num_threads = SETTINGS["threads"] or 1
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
        setattr(net.opt, "use_" + name, False)
    if net.load_param(str(file)) or net.load_model(str(file.with_suffix(".bin"))):
        raise SystemExit(f"ncnn cannot load {file}")

    def run(x):
        with net.create_extractor() as extractor:
            extractor.input(net.input_names()[0], ncnn.Mat(np.ascontiguousarray(x[0], np.float32)).clone())
            code, y = extractor.extract(net.output_names()[0])
            if code:
                raise SystemExit(f"ncnn could not run the network: {code}")
            return np.array(y).reshape(SETTINGS["output_shape"])

    return run
''',
}

PACKAGES = {"litert": "ai-edge-litert"}
"""What pip calls a runtime's package, where it is not the runtime's name."""
