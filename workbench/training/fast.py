"""The same network and the same Adam, computed faster. The model itself stays one of stock Keras layers.

`forward(model)` walks through the model's layers and computes what `model(radiographs, training=...)` does, with
three things done otherwise on CPUs:

- Batch normalisation, the ReLU after it and the concatenation before it are one operation each way, and a dense
  block's batch statistics are computed once per piece, not once per layer that reads it (`kernels.cc`).
- Convolutions of 1×1 are matrix products, whose weight gradients are many times faster than a convolution's.
- A 1×1 convolution before an average pooling is done after it, on a quarter of the pixels: both are linear.

On a GPU, in float16, or where nothing can be compiled, batch normalisation is TensorFlow's fused operation.

    compute = forward(model)
    scores = compute(radiographs, training=True)      # (B, H, W, 1) uint8 -> (B, K) float32
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable

import keras
import tensorflow as tf

from workbench.training import kernels


@keras.saving.register_keras_serializable("workbench")
class Adam(keras.optimizers.Adam):
    """Keras's Adam through TensorFlow's one operation per variable, of the same formula, instead of ten."""

    def apply(self, grads, trainable_variables=None):
        """Update the variables; see `keras.optimizers.Optimizer.apply`."""
        step = tf.cast(self.iterations.value + 1, tf.float32)
        self._powers = tf.pow(self.beta_1, step), tf.pow(self.beta_2, step)
        super().apply(grads, trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        """Update one variable and its two moments."""
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,  # a tf.Variable: Keras has unwrapped it
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=self._powers[0],
            beta2_power=self._powers[1],
            lr=tf.cast(learning_rate, tf.float32),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=tf.cast(gradient, tf.float32),
        )


def forward(model: keras.Model, *, compiled: bool = True) -> Callable:
    """A function that computes what a functional Keras model computes.

    Args:
        model: functional, each layer called once, channels last, as the networks of keras.applications are.
        compiled: False leaves the compiled operations out.

    Returns:
        `compute(inputs, training=False)`; while training it updates the moving statistics as the model would.
    """
    operations = None
    on_cpu = not tf.config.get_visible_devices("GPU")
    if compiled and on_cpu and keras.dtype_policies.get(_policy(model)).compute_dtype != "float16":
        operations = kernels.load()

    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    readers = collections.Counter(id(tensor) for layer in layers for tensor in _inputs(layer))

    def compute(inputs, training: bool = False):
        walk = _Walk(operations, on_cpu, training)
        values = {id(model.inputs[0]): inputs}
        for layer in layers:
            value = walk.step(layer, [values[id(tensor)] for tensor in _inputs(layer)])
            # What several layers read is carried out once; a join is cheap, and its pieces know their readers.
            alone = readers[id(layer.output)] == 1 or isinstance(value, _Joined)
            values[id(layer.output)] = value if alone else walk.whole(value)
        return walk.whole(values[id(model.outputs[0])])

    return compute


def _inputs(layer: keras.layers.Layer) -> list:
    """The symbolic tensors that a layer reads."""
    return layer.input if isinstance(layer.input, list) else [layer.input]


def _policy(model: keras.Model) -> str:
    """The precision of the network's layers; those around it are float32 in any."""
    normalised = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    return (normalised or model.layers)[0].dtype_policy.name


class _Piece:
    """A tensor that a dense block joins, and, while training, its moments.

    Every reader takes the tensor from here and leaves what it passes on, so that backwards the readers add their
    gradients to one another's, the last one first.
    """

    def __init__(self, tensor):
        self.tensor, self.moments = tensor, None


class _Joined:
    """A concatenation of pieces along the channels that has not been carried out."""

    def __init__(self, pieces: list[_Piece]):
        self.pieces = pieces


class _Normalised:
    """Pieces and the batch normalisation that awaits them, and perhaps a ReLU."""

    def __init__(self, pieces: list[_Piece], layer: keras.layers.BatchNormalization):
        self.pieces, self.layer = pieces, layer


class _Pointwise:
    """A tensor and the 1×1 convolution that awaits it."""

    def __init__(self, tensor, layer: keras.layers.Conv2D):
        self.tensor, self.layer = tensor, layer


class _Walk:
    """One way through a network: puts off what is better done together with what comes next."""

    def __init__(self, operations, on_cpu: bool, training: bool):
        self.operations, self.on_cpu, self.training = operations, on_cpu, training

    def step(self, layer: keras.layers.Layer, inputs: list):
        """What a layer makes of its inputs; they and the result may be put off."""
        value = inputs[0]
        if isinstance(layer, keras.layers.Concatenate) and layer.axis in (3, -1):
            return _Joined([piece for value in inputs for piece in self.pieces(value)])
        if isinstance(layer, keras.layers.BatchNormalization):
            return _Normalised(self.pieces(value), layer)
        if isinstance(value, _Normalised) and _is_relu(layer):
            return self.normalise(value, relu=True)
        linear = isinstance(value, _Pointwise) and value.layer.activation is keras.activations.linear
        if linear and isinstance(layer, keras.layers.AveragePooling2D):
            return self.convolve(_Pointwise(layer(value.tensor), value.layer))
        inputs = [self.whole(value) for value in inputs]
        if self.on_cpu and _is_pointwise(layer):
            return _Pointwise(inputs[0], layer)
        takes_training = "training" in inspect.signature(layer.call).parameters
        told = {"training": self.training} if takes_training else {}
        return layer(inputs if isinstance(layer.input, list) else inputs[0], **told)

    def pieces(self, value) -> list[_Piece]:
        """The pieces of a value: those that it joins, or itself."""
        return value.pieces if isinstance(value, _Joined) else [_Piece(self.whole(value))]

    def whole(self, value):
        """The tensor that a value stands for."""
        if isinstance(value, _Joined):
            return tf.concat([piece.tensor for piece in value.pieces], -1)
        if isinstance(value, _Normalised):
            return self.normalise(value, relu=False)
        return self.convolve(value) if isinstance(value, _Pointwise) else value

    def convolve(self, value: _Pointwise):
        """A 1×1 convolution as a matrix product."""
        layer, stride = value.layer, value.layer.strides
        x = tf.cast(value.tensor, layer.compute_dtype)
        if stride != (1, 1):
            x = x[:, :: stride[0], :: stride[1]]
        kernel = tf.cast(tf.reshape(layer.kernel.value, [-1, layer.filters]), layer.compute_dtype)
        y = tf.matmul(tf.reshape(x, [-1, x.shape[-1]]), kernel)
        if layer.use_bias:
            y = tf.nn.bias_add(y, tf.cast(layer.bias.value, layer.compute_dtype))
        return layer.activation(tf.reshape(y, tf.concat([tf.shape(x)[:3], [layer.filters]], 0)))

    def normalise(self, value: _Normalised, *, relu: bool):
        """Batch normalisation of joined pieces, and the ReLU after it."""
        layer, pieces = value.layer, value.pieces
        for piece in pieces:
            piece.tensor = tf.cast(piece.tensor, layer.compute_dtype)
        learning = self.training and layer.trainable
        mean, variance = layer.moving_mean.value, layer.moving_variance.value
        gamma = layer.gamma.value if layer.scale else tf.ones_like(mean)
        beta = layer.beta.value if layer.center else tf.zeros_like(mean)
        if self.operations:
            for piece in pieces:
                if learning and piece.moments is None:
                    piece.moments, piece.tensor = self.operations.workbench_moments(x=piece.tensor)
            y, next_mean, next_variance, _, passed = self.operations.workbench_norm_relu(
                pieces=[piece.tensor for piece in pieces],
                moments=[piece.moments for piece in pieces] if learning else [],
                moving_mean=mean,
                moving_variance=variance,
                gamma=gamma,
                beta=beta,
                epsilon=layer.epsilon,
                momentum=layer.momentum,
                relu=relu,
                K=len(pieces) if len(pieces) > 1 else 0,
            )
            for piece, tensor in zip(pieces, passed, strict=False):
                piece.tensor = tensor
        else:
            y, next_mean, next_variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=tf.concat([piece.tensor for piece in pieces], -1),
                scale=gamma,
                offset=beta,
                mean=mean,
                variance=variance,
                epsilon=layer.epsilon,
                # The operation returns the moving statistics already updated: far fewer graph nodes than by hand.
                exponential_avg_factor=1 - layer.momentum,
                is_training=learning,
            )
            y = tf.nn.relu(y) if relu else y
        if learning:
            layer.moving_mean.assign(next_mean)
            layer.moving_variance.assign(next_variance)
        return y


def _is_relu(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.ReLU):
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.relu


def _is_pointwise(layer: keras.layers.Layer) -> bool:
    return type(layer) is keras.layers.Conv2D and layer.kernel_size == (1, 1) and layer.groups == 1


@tf.RegisterGradient("WorkbenchMoments")
def _moments_gradient(operation, gradient, later):
    return kernels.load().workbench_moments_grad(
        x=operation.inputs[0], moments=operation.outputs[0], gradient=gradient, later=later
    )


@tf.RegisterGradient("WorkbenchNormRelu")
def _norm_relu_gradient(operation, gradient, _next_mean, _next_variance, _used, *later):
    gamma, beta = operation.inputs[-2:]
    made = kernels.load().workbench_norm_relu_grad(
        dy=gradient,
        pieces=list(operation.inputs[: operation.get_attr("P")]),
        later=list(later),
        used=operation.outputs[3],
        gamma=gamma,
        beta=beta,
        epsilon=operation.get_attr("epsilon"),
        relu=operation.get_attr("relu"),
        M=operation.get_attr("M"),
    )
    return [*made.dpieces, *made.dmoments, None, None, made.dgamma, made.dbeta]
