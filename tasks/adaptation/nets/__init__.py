# SPDX-License-Identifier: Apache-2.0
"""Parts of Meta-DMoE: backbones, the aggregator over experts, the step that adapts a student."""
