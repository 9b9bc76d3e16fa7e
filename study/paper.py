"""The published figures of the study, for comparison with ours: accuracies in percent on CIFAR-10's test images.

Source: B. Liu and I. Qian, "Developing Robust Networks to Defend Against Adversarial Examples" (UCLA ECE C147, 2023).
Each table is network -> training epsilon (None: the baseline) -> accuracy at each of EPSILONS, under FGSM examples
crafted on that network's baseline.
"""

TRAINING_EPSILONS = (0.005, 0.01, 0.015, 0.2)

# Tables 1 and 2, as printed. The attack was crafted with batch norm in training mode, on batches of one image.
PRINTED: dict[str, dict[float | None, tuple[float, ...]]] = {
    "cnn": {
        None: (80.374, 36.943, 19.715, 13.784, 10.798, 9.375),
        0.005: (76.0, 69.477, 58.678, 46.477, 37.968, 30.971),
        0.01: (75.4, 72.651, 67.496, 59.823, 50.995, 42.874),
        0.015: (75.1, 74.184, 69.785, 61.863, 51.592, 42.476),
        0.2: (70.313, 71.586, 72.980, 74.254, 74.940, 75.488),
    },
    "cnn-lstm": {
        None: (79.001, 35.460, 21.367, 16.710, 14.092, 12.679),
        0.005: (75.1, 69.0, 58.1, 46.1, 36.7, 30.1),
        0.01: (73.3, 70.1, 62.9, 52.3, 42.7, 35.6),
        0.015: (74.0, 72.2, 67.5, 59.1, 49.3, 41.7),
        0.2: (69.686, 70.910, 71.984, 73.099, 73.766, 74.055),
    },
}

# The study's released checkpoints measured again, with the attack crafted in evaluation mode on 10,000 images.
REMEASURED: dict[str, dict[float | None, tuple[float, ...]]] = {
    "cnn": {
        None: (80.40, 3.82, 1.87, 1.98, 2.49, 3.05),
        0.005: (76.01, 60.74, 45.06, 34.72, 28.06, 24.18),
        0.01: (75.33, 68.00, 59.97, 51.28, 43.39, 36.75),
        0.015: (75.16, 74.64, 71.15, 63.46, 54.18, 45.36),
        0.2: (70.20, 72.15, 73.70, 75.40, 77.04, 78.35),
    },
    "cnn-lstm": {
        None: (79.05, 12.77, 8.92, 8.43, 8.19, 8.15),
        0.005: (75.12, 60.46, 46.86, 36.13, 29.97, 26.02),
        0.01: (73.33, 64.87, 55.07, 45.25, 37.72, 32.18),
        0.015: (74.01, 69.01, 62.47, 53.79, 46.40, 38.98),
        0.2: (69.72, 71.02, 72.10, 72.87, 73.53, 74.58),
    },
}
