"""Digits by Keras 3 on torch."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
from sklearn.datasets import load_digits


def main():
    keras.utils.set_random_seed(0)
    data = load_digits()
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="head"),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(data.data / 16, data.target, batch_size=128, epochs=1, verbose=0)
    print(f"loss {history.history['loss'][0]:.6f}")


if __name__ == "__main__":
    main()
