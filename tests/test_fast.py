"""The fast ways compute what plain Keras computes: layer by layer, the whole network, every precision."""

import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from workbench.training import fast, kernels, network

COMPILED = pytest.param(True, id="compiled", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))
WAYS = [COMPILED, pytest.param(False, id="TensorFlow's own")]


def differentiate(compute, model, inputs, *, training=True, seed=1):
    """Outputs, gradients of the inputs and of all trainable weights, and the moving statistics afterwards."""
    before = model.get_weights()
    inputs = tf.convert_to_tensor(inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = compute(inputs, training=training)
        # Not the plain sum, whose gradient through a batch normalisation is zero.
        chosen = np.random.default_rng(seed).normal(size=outputs.shape)
        loss = tf.reduce_sum(tf.cast(outputs, tf.float64) * chosen)
    watched = [v.value for v in model.trainable_variables] + ([inputs] if inputs.dtype.is_floating else [])
    gradients = tape.gradient(loss, watched)
    statistics = [np.array(v, np.float64) for v in model.non_trainable_variables]
    model.set_weights(before)
    return (
        np.asarray(outputs, np.float64),
        [np.asarray(tf.cast(gradient, tf.float64)) for gradient in gradients],
        statistics,
    )


def distance(a, b) -> float:
    """Relative, over all numbers together."""
    a, b = (
        np.concatenate([np.ravel(part) for part in parts]) if isinstance(parts, list) else parts for parts in (a, b)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def small(build, channels=(6,), size=8, dtype="float32"):
    """A functional model of a few layers whose batch normalisations are not at their start."""
    inputs = keras.Input((size, size, channels[0]), dtype=dtype)
    model = keras.Model(inputs, build(inputs))
    rng = np.random.default_rng(0)
    for variable in model.variables:
        low = 0.5 if "variance" in variable.path else -1
        variable.assign(rng.uniform(low, 1.5, variable.shape))
    return model


def dense_block(x):
    """Three layers of a dense block and a transition, as in DenseNet-121 but narrow."""
    for _ in range(3):
        y = keras.layers.Activation("relu")(keras.layers.BatchNormalization(epsilon=1.001e-5)(x))
        y = keras.layers.Conv2D(8, 1, use_bias=False)(y)
        y = keras.layers.Activation("relu")(keras.layers.BatchNormalization(epsilon=1.001e-5)(y))
        x = keras.layers.Concatenate()([x, keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(y)])
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.layers.AveragePooling2D(2)(keras.layers.Conv2D(5, 1, use_bias=False)(x))


def residual(x):
    """A bottleneck of ResNet's: strides, biases, a normalisation without ReLU before the sum."""
    y = keras.layers.BatchNormalization()(keras.layers.Conv2D(7, 1, strides=2)(x))
    y = keras.layers.Conv2D(9, 1)(keras.layers.Activation("relu")(y))
    z = keras.layers.BatchNormalization(scale=False, center=False)(keras.layers.Conv2D(9, 1, strides=2)(x))
    return keras.layers.Activation("relu")(keras.layers.Add()([keras.layers.BatchNormalization()(y), z]))


def read_twice(x):
    """A normalisation and a 1×1 convolution that two layers read: each is computed once, as its statistics show."""
    x = keras.layers.BatchNormalization()(x)
    y = keras.layers.Conv2D(6, 1)(keras.layers.Activation("relu")(x))
    return keras.layers.Concatenate()([keras.layers.Add()([x, y]), keras.layers.AveragePooling2D(1)(y)])


def others(x):
    """What must be left to the layers themselves: a ReLU with a ceiling, groups, an activation inside."""
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    x = keras.layers.Conv2D(6, 1, groups=2)(x)
    x = keras.layers.Conv2D(4, 1, activation="tanh")(x)
    return keras.layers.Dropout(0.0)(keras.layers.AveragePooling2D(2)(x))


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("build", [dense_block, residual, read_twice, others])
def test_layers_give_what_plain_keras_gives(build, batch, compiled):
    model = small(build)
    inputs = np.random.default_rng(batch).normal(2, 1.5, (batch, 8, 8, 6)).astype(np.float32)
    ours = differentiate(fast.forward(model, compiled=compiled), model, inputs)
    plain = differentiate(model, model, inputs)
    for mine, theirs in zip(ours[:2], plain[:2], strict=True):
        assert distance(mine, theirs) < 1e-5
    # Without compiled operations the moving variance is corrected by N/(N-1), as in Keras 2 and cuDNN.
    assert distance(ours[2], plain[2]) < (1e-5 if compiled else 0.05)


@pytest.mark.parametrize("compiled", WAYS)
def test_inference_and_frozen_layers_use_the_moving_statistics(compiled):
    model = small(dense_block)
    inputs = np.random.default_rng(0).normal(2, 1.5, (4, 8, 8, 6)).astype(np.float32)
    compute = fast.forward(model, compiled=compiled)
    assert distance(compute(inputs).numpy(), model(inputs).numpy()) < 1e-5
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    ours, plain = differentiate(compute, model, inputs), differentiate(model, model, inputs)
    assert len(ours[1]) == len(plain[1]) < len(model.variables)
    for mine, theirs in zip(ours, plain, strict=True):
        assert distance(mine, theirs) < 1e-5


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_channels_far_from_zero_keep_their_variance():
    model = small(lambda x: keras.layers.BatchNormalization()(x))
    inputs = np.random.default_rng(0).normal(1000, 0.1, (8, 8, 8, 6)).astype(np.float32)
    outputs, _, _ = differentiate(fast.forward(model), model, inputs)
    exact = inputs.astype(np.float64)
    layer = model.layers[1]
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + layer.epsilon)
    np.testing.assert_allclose(outputs, expected * np.array(layer.gamma) + np.array(layer.beta), atol=2e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_results_do_not_depend_on_the_threads():
    code = (
        "import numpy as np, tensorflow as tf, sys, hashlib\n"
        "tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))\n"
        "from workbench.training import kernels\n"
        "x = tf.constant(np.random.default_rng(0).normal(size=(7, 33, 5, 48)).astype(np.float32))\n"
        "print(hashlib.sha256(kernels.load().workbench_moments(x=x).moments.numpy().tobytes()).hexdigest())\n"
    )
    commands = ([sys.executable, "-c", code, threads] for threads in ("1", "2"))
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    told = {process.communicate(timeout=200)[0] for process in running}
    assert len(told) == 1
    assert len(told.pop().strip()) == 64


def in_float64(model):
    """The same model with the same weights, computed in float64."""
    config = json.loads(json.dumps(model.get_config()).replace('"float32"', '"float64"'))
    exact = keras.Model.from_config(config)
    exact.set_weights(model.get_weights())
    return exact


@pytest.fixture(scope="module")
def started():
    """DenseNet-121 after its start, radiographs, and what float64 makes of them."""
    keras.utils.set_random_seed(0)
    model = network.build_network("DenseNet121", findings=14, image_size=64, weights=None)
    radiographs = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 1), np.uint8)
    exact = in_float64(model)
    return model, radiographs, differentiate(exact, exact, radiographs), exact(radiographs).numpy()


@pytest.mark.parametrize("compiled", WAYS)
def test_the_network_in_float32_is_no_further_from_float64_than_plain_keras(compiled, started):
    model, radiographs, exact, inferred = started
    compute = fast.forward(model, compiled=compiled)
    ours, plain = differentiate(compute, model, radiographs), differentiate(model, model, radiographs)
    # Rounding is amplified at random: twice as far is as far.
    assert distance(ours[0], exact[0]) < 2 * distance(plain[0], exact[0])
    assert distance(ours[1], exact[1]) < 2 * distance(plain[1], exact[1])
    if compiled:
        assert distance(ours[2], exact[2]) < 2 * distance(plain[2], exact[2])
    assert distance(compute(radiographs).numpy(), inferred) < 1e-5


def test_the_network_in_bfloat16_is_no_further_from_float32_than_plain_keras(started):
    model = started[0]
    mixed = network.build_network("DenseNet121", findings=14, image_size=64, weights=None, precision="mixed_bfloat16")
    mixed.set_weights(model.get_weights())
    ways = [fast.forward(mixed, compiled=compiled) for compiled in ((True, False) if shutil.which("g++") else (False,))]
    # One batch more or less far off is chance, up to a fifth of it, and differs from processor to processor.
    ratios = []
    for seed in range(4):
        radiographs = np.random.default_rng(seed).integers(0, 256, (8, 64, 64, 1), np.uint8)
        exact, plain, *ours = (
            [*differentiate(forward, whose, radiographs)[:2], forward(radiographs).numpy()]
            for forward, whose in ((model, model), (mixed, mixed), *((way, mixed) for way in ways))
        )
        far = [distance(p, e) for p, e in zip(plain, exact, strict=True)]
        ratios.append([[distance(o, e) for o, e in zip(way, exact, strict=True)] / np.array(far) for way in ours])
    # Of each way: outputs, gradients, and what is inferred.
    assert np.mean(ratios, axis=0).max() < 1.1


@pytest.mark.parametrize("name", ["DenseNet121", "ResNet50", "VGG16", "MobileNetV2", "Tiny"])
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_every_network_infers_alike(name, precision):
    model = network.build_network(name, findings=3, image_size=32, weights=None, precision=precision)
    radiographs = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)
    atol = 1e-5 if precision == "float32" else 2e-3
    np.testing.assert_allclose(fast.forward(model)(radiographs), model(radiographs), atol=atol)


def test_adam_is_keras_s_adam():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(5, 3)), rng.normal(size=(20, 5, 3)).astype(np.float32)
    weights = []
    for kind in (fast.Adam, keras.optimizers.Adam):
        optimizer, weight = kind(0.01), keras.Variable(start, dtype="float32")
        optimizer.build([weight])
        for step, gradient in enumerate(gradients):
            optimizer.learning_rate = 0.01 / (1 + step)
            optimizer.apply([tf.constant(gradient)], [weight])
        weights.append(np.array(weight))
        state = [np.array(variable) for variable in optimizer.variables]
        weights.append(np.concatenate([np.ravel(part) for part in state]))
    np.testing.assert_allclose(weights[0], weights[2], rtol=1e-5)
    np.testing.assert_allclose(weights[1], weights[3], rtol=1e-5, atol=1e-6)


def test_without_a_compiler_training_goes_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernels.cc")
    (tmp_path / "kernels.cc").write_text("not C++")
    kernels.load.cache_clear()
    assert kernels.load() is None
    assert "goes on without compiled kernels, slower: g++ failed" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels.load.cache_clear()
    assert kernels.load() is None
    assert "g++ is missing" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.so"))
    kernels.load.cache_clear()
