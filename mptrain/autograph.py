"""What AutoGraph need not look at."""

import tensorflow as tf

# AutoGraph rewrites every function that it meets while a step is traced, 20 to 170 ms each. Those of mptrain branch with
# `tf.cond`, so there is nothing to rewrite. Only for what calls nothing of the user's, which would be left as it is too.
as_written = tf.autograph.experimental.do_not_convert
