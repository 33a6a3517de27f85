# SPDX-License-Identifier: Apache-2.0
"""Parts of multi-gate networks: levels of experts, gates, embeddings, what plans are written with."""
