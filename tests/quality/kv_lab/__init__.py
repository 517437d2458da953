# SPDX-License-Identifier: Apache-2.0
"""A laboratory for the codec: plans of any make, tried on real models by fake quantisation.

    lab_model   models, texts, and what is kept between runs
    lab_stats   what a plan is fitted to: moments and attention metric of every head
    lab_plan    LabPlan: transforms and widths of every head; fitting, solving, reading and writing `.tqkv`
    lab_quant   a row through the codes and back
    lab_run     a model over a text while K and V are what a store would give back
    lab_tails   how heavy the tails are that the codes meet
    lab_table   docs/results/variants.json
"""
