# SPDX-License-Identifier: Apache-2.0
"""Point-MoE: one network that labels the points of any scanner (Chen et al., arXiv 2505.23926)."""
