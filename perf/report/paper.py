"""Published figures of the paper (Lample et al. 2019), for comparison."""

# Table 1: test perplexity by layers, for memories 0, 1, 2, 3 as far as given, by width.
TABLE_1 = {
    1024: {
        12: (17.6566, 15.6184, 14.7886, 14.4727),
        16: (16.6508, 14.8761, 14.1023),
        24: (16.0186, 14.6188),
    },
    1600: {12: (14.9994, 13.6522), 16: (14.3643, 13.1668), 24: (13.9515,)},
}

# Table 2: 6 layers, 4 heads, k 32, memory at layer 5, by |C|; without and with batch norm.
TABLE_2_NUM_SUBKEYS = (128, 256, 384, 512, 768, 1024)
TABLE_2 = {
    "none": {
        "perplexity": (22.8, 21.7, 20.9, 20.5, 20.0, 19.8),
        "usage": (1.00, 0.990, 0.838, 0.644, 0.380, 0.258),
        "kl": (0.56, 0.69, 0.94, 1.20, 1.70, 2.06),
    },
    "batch": {
        "perplexity": (23.0, 21.9, 20.7, 19.8, 18.7, 18.0),
        "usage": (1.00, 1.000, 0.996, 0.979, 0.903, 0.803),
        "kl": (0.56, 0.58, 0.65, 0.68, 0.83, 0.95),
    },
}
NO_MEMORY_PERPLEXITY = 23.0  # of the same 6 layers (section 4.5)

# Table 3: position of the memory in 6 layers.
TABLE_3 = {
    "perplexity": (21.5, 20.7, 20.4, 20.1, 19.8, 20.3),
    "usage": (1.00, 1.00, 0.983, 0.971, 0.979, 0.969),
    "kl": (2.23, 0.95, 0.74, 0.71, 0.68, 1.08),
}

# Table 4: inference speed of a whole 6-layer language model with one memory, words a second, on
# the authors' GPUs.
TABLE_4_NUM_SUBKEYS = TABLE_2_NUM_SUBKEYS
MEMORY_SIZE_LABELS = {
    128**2: "16k",
    256**2: "65k",
    384**2: "147k",
    512**2: "262k",
    768**2: "590k",
    1024**2: "1M",
}
TABLE_4_WORDS_PER_S = {
    "flat": (35_000, 28_500, 13_900, 7_700, 4_700, 1_200),
    "product": (35_800, 36_700, 36_400, 36_300, 36_200, 35_700),
}
# Flat keys were trained up to 147k slots only; product keys are Table 2's with batch norm.
TABLE_4_FLAT = {
    "perplexity": (23.2, 22.6, 22.1),
    "usage": (0.196, 0.136, 0.101),
    "kl": (2.04, 2.48, 2.77),
}

# Figure 6, from the text of section 4.5: models of equal heads · k are alike.
FIGURE_6_EQUAL = {"pairs": ((1, 64), (2, 32), (4, 16), (8, 8)), "usage": 0.70, "perplexity": 20.5}
