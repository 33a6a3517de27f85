# SPDX-License-Identifier: Apache-2.0
"""What is written after a test, while training, and by ``predict``: clips to hear, and what they are worth."""
