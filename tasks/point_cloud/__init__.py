# SPDX-License-Identifier: Apache-2.0
"""Point-cloud semantic segmentation trained jointly on many sensors and label sets (Point-MoE)."""
