"""Published figures of the paper (Lample et al. 2019), for comparison."""

# Table 4: inference speed of a whole 6-layer language model with one memory, words a second, on
# the authors' GPUs.
TABLE_4_NUM_SUBKEYS = (128, 256, 384, 512, 768, 1024)
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
