"""FAKES of TensorRT and of the CUDA bindings, so that the TensorRT backend's code can run without a GPU.

They are fakes, not emulators. What passing on them shows: calls are made with the real names and argument
order, in a legal order; return values and logged errors are looked at; every stream dependency that the
result needs is stated by an event, a wait or a synchronise (queued work runs late and in an unkind order);
no freed or foreign memory is touched; and the data that moves through a bundle is the right data, because
the "engine" runs the ONNX graph with ONNX Runtime on the CPU.

What it does not show: that real TensorRT accepts a graph, how fast anything is, how much memory a real plan
needs, what a real kernel rounds to, or the exact words of real messages. Every time and byte count is made up,
by the simple rules documented where they are computed.

Use `fakes.install.install`. Members that the real packages do not have start with `fake_`.
"""
