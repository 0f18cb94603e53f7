// Drives the kernels of csrc/gan_loss.cu (see driver.h). Words: op dtype n_a n_b n_real, then for each half term weight target has_targets,
// then reduction relative. n_b < 0: one vector of logits, cut at n_real.
#include "../../csrc/gan_loss.cu"

#include "driver.h"

struct Half {
  std::int64_t term;
  double weight, target;
  std::int64_t has_targets;
};

int main() {
  driver::Job job;
  const std::string op = job.word(), dtype = job.word();
  const std::int64_t n_a = job.integer(), n_b = job.integer(), n_real = job.integer(), n = n_a + (n_b < 0 ? 0 : n_b);
  Half halves[2];
  for (Half& h : halves) {
    h.term = job.integer();
    h.weight = job.number();
    h.target = job.number();
    h.has_targets = job.integer();
  }
  const std::int64_t reduction = job.integer(), relative = job.integer();
  driver::with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = gankern::sum_t<T>;
    const T* a = job.input<T>(n_a);
    const T* b = job.input<T>(n_b);
    const A* targets_real = job.input<A>(halves[0].has_targets ? n_real : -1);
    const A* targets_fake = job.input<A>(halves[1].has_targets ? n - n_real : -1);
    const gankern::Halves<T> h{a,
                               b != nullptr ? b : a + n_real,
                               n_real,
                               n,
                               gankern::make_part<A>(halves[0].term, halves[0].weight, halves[0].target, targets_real, n_real, reduction),
                               gankern::make_part<A>(halves[1].term, halves[1].weight, halves[1].target, targets_fake, n - n_real, reduction),
                               relative};
    if (op == "loss") {
      A* loss = job.output<A>(reduction == 0 ? n : 1);
      A* stats = job.output<A>(3);
      A* grad = job.output<A>(n);
      const std::int64_t blocks = gankern::loss_blocks(n);
      A* partials = job.output<A>(blocks > 1 ? blocks * (gankern::kSums + 2) : -1);
      job.run([&] { gankern::launch_loss<T>(h, reduction, loss, stats, grad, grad + n_real, partials, nullptr); });
    } else if (op == "grad2") {
      const bool g_each = reduction == 0;
      const A* g = job.input<A>(g_each ? n : 1);
      const T* ca = job.input<T>(n_a);
      const T* cb = job.input<T>(n_b);
      T* da = job.output<T>(n_a);
      T* db = job.output<T>(n_b);
      job.run([&] {
        gankern::launch_grad2<T>(h, g, g_each, ca, cb != nullptr ? cb : ca + n_real, da, db != nullptr ? db : da + n_real, nullptr);
      });
    } else {
      driver::Job::stop("unknown op");
    }
  });
}
