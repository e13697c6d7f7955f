"""The cells that Yang et al. (NeurIPS 2020) published, with their picks in the order of the published weights."""

from istanas.space.genotype import Genotype

PUBLISHED: dict[str, Genotype] = {
    "ISTA_twostage": Genotype(
        normal=(
            (("skip_connect", 0), ("dil_conv_3x3", 1)),
            (("sep_conv_5x5", 0), ("dil_conv_3x3", 2)),
            (("dil_conv_3x3", 1), ("sep_conv_3x3", 0)),
            (("sep_conv_3x3", 2), ("skip_connect", 0)),
        ),
        reduce=(
            (("avg_pool_3x3", 0), ("sep_conv_5x5", 1)),
            (("dil_conv_5x5", 2), ("max_pool_3x3", 1)),
            (("dil_conv_5x5", 3), ("sep_conv_3x3", 1)),
            (("dil_conv_5x5", 4), ("sep_conv_5x5", 1)),
        ),
    ),
    "ISTA_onestage": Genotype(
        normal=(
            (("skip_connect", 0), ("dil_conv_3x3", 1)),
            (("sep_conv_3x3", 1), ("dil_conv_5x5", 2)),
            (("avg_pool_3x3", 3), ("sep_conv_3x3", 1)),
            (("sep_conv_5x5", 1), ("sep_conv_3x3", 2)),
        ),
        reduce=(
            (("avg_pool_3x3", 0), ("max_pool_3x3", 1)),
            (("skip_connect", 0), ("max_pool_3x3", 1)),
            (("sep_conv_5x5", 1), ("avg_pool_3x3", 0)),
            (("max_pool_3x3", 0), ("dil_conv_5x5", 2)),
        ),
    ),
    "ISTA_ImageNet": Genotype(
        normal=(
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 0)),
            (("sep_conv_3x3", 1), ("skip_connect", 2)),
            (("sep_conv_3x3", 1), ("sep_conv_3x3", 0)),
            (("sep_conv_3x3", 1), ("dil_conv_5x5", 4)),
        ),
        reduce=(
            (("skip_connect", 0), ("sep_conv_3x3", 1)),
            (("dil_conv_5x5", 2), ("sep_conv_3x3", 0)),
            (("sep_conv_3x3", 0), ("skip_connect", 2)),
            (("sep_conv_3x3", 2), ("skip_connect", 3)),
        ),
    ),
}
"""The published cells: `ISTA_twostage` and `ISTA_onestage` were found on CIFAR-10, `ISTA_ImageNet` on ImageNet."""
