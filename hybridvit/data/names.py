"""Names of data sets that say which images they are, wherever these lie.

Apart from the sets themselves, because reports ask and import no torch.
"""

PUBLIC = frozenset(
    {
        "digits",
        "imagenet",
        "mnist",
        "fashion_mnist",
        "kmnist",
        "cifar10",
        "cifar100",
        "svhn",
        "stl10",
        "flowers102",
        "oxford_iiit_pet",
        "food101",
        "eurosat",
        "dtd",
        "gtsrb",
    }
)
