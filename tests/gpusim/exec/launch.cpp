// One kernel launch: clusters are taken up as the device has room, warps get turns, and a launch in which nobody can go on ends
// with the list of who waits for what.
#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "../async/queue.h"
#include "machine.h"
#include "race.h"

namespace gpusim {

void fail(const Warp& w, const Instr& i, int lane, const std::string& what) {
  std::ostringstream s;
  const Launch& launch = *w.cta->cluster->launch;
  const int thread = w.thread(lane);
  const uint32_t* b = launch.block;
  s << what << "\n  in " << launch.kernel->name << ", line " << i.line << ": " << launch.kernel->text[&i - launch.kernel->code.data()]
    << "\n  block (" << w.cta->id[0] << ", " << w.cta->id[1] << ", " << w.cta->id[2] << "), thread (" << thread % b[0] << ", "
    << thread / b[0] % b[1] << ", " << thread / (b[0] * b[1]) << ")";
  throw Failure{s.str()};
}

int Cta::live_threads() const {
  int n = 0;
  for (const Warp& w : warps) n += __builtin_popcount(w.live);
  return n;
}

bool Cluster::done() const {
  return std::all_of(ctas.begin(), ctas.end(), [](const auto& cta) { return cta->live_warps == 0; });
}

// ---- one warp
void Warp::split(Mask others, uint32_t pc) {
  Fragment rest = *now;
  rest.mask = others;
  rest.pc = pc;
  rest.tried = false;
  now->mask &= ~others;
  const size_t at = static_cast<size_t>(now - fragments.data());
  fragments.push_back(rest);
  now = &fragments[at];
}

// Fragments at one place become one; then the deepest call, in it the lowest pc, has the turn.
Fragment* Warp::pick() {
  std::erase_if(fragments, [](const Fragment& f) { return f.mask == 0; });
  for (size_t a = 0; a < fragments.size(); ++a)
    for (size_t b = fragments.size() - 1; b > a; --b)
      if (fragments[a].same_place(fragments[b]) && fragments[a].released == fragments[b].released) {
        fragments[a].mask |= fragments[b].mask;
        fragments[a].tried = false;
        fragments.erase(fragments.begin() + static_cast<std::ptrdiff_t>(b));
      }
  Fragment* best = nullptr;
  for (Fragment& f : fragments)
    if (!f.tried && (!best || f.depth > best->depth || (f.depth == best->depth && f.pc < best->pc))) best = &f;
  return best;
}

bool Warp::run(int budget) {
  const Kernel& k = *cta->cluster->launch->kernel;
  Counters& counters = cta->cluster->launch->counters;
  for (Fragment& f : fragments) f.tried = false;
  bool ran = false;
  while (budget > 0 && live) {
    now = pick();
    if (!now) break;
    // With several fragments, each jump or step may bring this one to where another stands.
    uint32_t limit = 0xffffffffu;
    for (const Fragment& f : fragments)
      if (&f != now && f.depth == now->depth && f.pc > now->pc) limit = std::min(limit, f.pc);
    const size_t count = fragments.size();
    while (budget > 0) {
      const Instr& i = k.code[now->pc];
      Mask m = now->mask;
      --budget;
      if (i.guard) {
        const Mask p = pred(i.guard - 1);
        m &= i.guard_negated ? ~p : p;
        if (!m) {
          if (++now->pc >= limit) break;
          continue;
        }
        if (i.whole && m != now->mask) {
          split(now->mask & ~m, now->pc + 1);
          break;  // the part that runs the instruction is picked again
        }
      }
      const Flow flow = i.exec(*this, i, m);
      counters.instructions += flow != Flow::kWait;
      if (flow == Flow::kNext) {
        ran = true;
        if (++now->pc >= limit) break;
        if (fragments.size() != count) break;
      } else if (flow == Flow::kJump) {
        ran = true;
        if (fragments.size() != count || count > 1 || !now->mask) break;
      } else {
        now->tried = true;
        if (flow == Flow::kYield) ++now->pc;
        break;
      }
    }
  }
  if (!live && !fragments.empty()) {
    fragments.clear();
    --cta->live_warps;
  }
  // Used up: there was work. Otherwise every fragment waits or has yielded.
  return ran && budget <= 0;
}

// ---- the launch
namespace {

uint32_t special(const Launch& launch, const Cta& cta, const Warp& w, const Kernel::Special& s, int lane) {
  const int thread = w.thread(lane), k = s.dimension;
  const uint32_t *b = launch.block, *c = launch.cluster, *g = launch.grid;
  const uint32_t tid[3] = {thread % b[0], thread / b[0] % b[1], thread / (b[0] * b[1])};
  switch (s.id) {
    case SpecialId::kTid:
      return tid[k];
    case SpecialId::kNtid:
      return b[k];
    case SpecialId::kCtaid:
      return cta.id[k];
    case SpecialId::kNctaid:
      return g[k];
    case SpecialId::kClusterCtaid:
      return cta.id[k] % c[k];
    case SpecialId::kClusterNctaid:
      return c[k];
    case SpecialId::kClusterid:
      return cta.id[k] / c[k];
    case SpecialId::kNclusterid:
      return g[k] / c[k];
    case SpecialId::kLaneid:
      return static_cast<uint32_t>(lane);
    case SpecialId::kWarpid:
      return static_cast<uint32_t>(w.index);
    case SpecialId::kNwarpid:
      return static_cast<uint32_t>(launch.warps);
    case SpecialId::kSmid:
      return cta.cluster->index % static_cast<uint32_t>(launch.sms);
    case SpecialId::kNsmid:
      return static_cast<uint32_t>(launch.sms);
    case SpecialId::kMaskEq:
      return 1u << lane;
    case SpecialId::kMaskLt:
      return (1u << lane) - 1;
    case SpecialId::kMaskLe:
      return (2u << lane) - 1;
    case SpecialId::kMaskGt:
      return ~((2u << lane) - 1);
    case SpecialId::kMaskGe:
      return ~((1u << lane) - 1);
    case SpecialId::kClusterCtarank:
      return static_cast<uint32_t>(cta.rank);
    case SpecialId::kClusterNctarank:
      return c[0] * c[1] * c[2];
    case SpecialId::kExplicitCluster:
      return c[0] * c[1] * c[2] > 1;
    case SpecialId::kDynamicShared:
      return static_cast<uint32_t>(launch.dynamic_shared);
    case SpecialId::kTotalShared:
      return static_cast<uint32_t>(launch.kernel->static_shared + launch.dynamic_shared);
    default:
      return 0;
  }
}

void fill_registers(const Launch& launch, Cta& cta, Warp& w) {
  const Kernel& k = *launch.kernel;
  poison(w.registers, k.register_bytes);
  for (const Kernel::Constant& c : k.constants) {
    const uint64_t bits = c.bits + (c.parameter ? reinterpret_cast<uint64_t>(launch.parameters) : 0);
    if (c.width == 0)
      w.pred(c.slot) = static_cast<Mask>(bits);
    else
      for (int l = 0; l < kLanes; ++l) put(w, c.slot, c.width, l, bits);
  }
  for (const Kernel::Special& s : k.specials) {
    if (s.id == SpecialId::kExplicitCluster)
      w.pred(s.slot) = special(launch, cta, w, s, 0) ? kAll : 0;
    else
      for (int l = 0; l < kLanes; ++l) w.reg<uint32_t>(s.slot)[l] = special(launch, cta, w, s, l);
  }
}

std::unique_ptr<Cta> make_cta(Launch& launch, Cluster& cluster, int rank, const uint32_t* first) {
  auto cta = std::make_unique<Cta>();
  const Kernel& k = *launch.kernel;
  cta->cluster = &cluster;
  cta->rank = rank;
  const uint32_t r = static_cast<uint32_t>(rank), *c = launch.cluster;
  const uint32_t within[3] = {r % c[0], r / c[0] % c[1], r / (c[0] * c[1])};
  for (int d = 0; d < 3; ++d) cta->id[d] = first[d] + within[d];
  cta->shared.resize(static_cast<size_t>(k.dynamic_shared_at + launch.dynamic_shared));
  poison(cta->shared.data(), cta->shared.size());
  cta->local.resize(static_cast<size_t>(k.local_bytes) * static_cast<size_t>(launch.warps) * kLanes);
  poison(cta->local.data(), cta->local.size());
  if (race::enabled()) cta->shadow = std::make_unique<SharedShadow>(cta->shared.size());
  cta->registers.resize(static_cast<size_t>(k.register_bytes) * static_cast<size_t>(launch.warps) + 64);
  cta->warps.resize(static_cast<size_t>(launch.warps));
  cta->live_warps = launch.warps;
  uint8_t* registers = cta->registers.data() + (64 - reinterpret_cast<uintptr_t>(cta->registers.data()) % 64) % 64;
  for (int i = 0; i < launch.warps; ++i) {
    Warp& w = cta->warps[static_cast<size_t>(i)];
    w.cta = cta.get();
    w.index = i;
    w.registers_held = k.registers;
    w.registers = registers + static_cast<size_t>(i) * k.register_bytes;
    const int threads = std::min(kLanes, launch.threads - i * kLanes);
    w.live = threads == kLanes ? kAll : (1u << threads) - 1;
    w.fragments.push_back({});
    w.fragments[0].mask = w.live;
    fill_registers(launch, *cta, w);
  }
  return cta;
}

std::unique_ptr<Cluster> make_cluster(Launch& launch, uint32_t index) {
  auto cluster = std::make_unique<Cluster>();
  const uint32_t *c = launch.cluster, x = launch.grid[0] / c[0], y = launch.grid[1] / c[1];
  const uint32_t first[3] = {index % x * c[0], index / x % y * c[1], index / (x * y) * c[2]};
  cluster->launch = &launch;
  cluster->index = index;
  for (uint32_t r = 0; r < c[0] * c[1] * c[2]; ++r) cluster->ctas.push_back(make_cta(launch, *cluster, static_cast<int>(r), first));
  for (auto& cta : cluster->ctas)
    for (Warp& w : cta->warps) race::start(w);
  cluster->async = make_async_queue(*cluster);
  return cluster;
}

[[noreturn]] void report_deadlock(const Launch& launch, const std::vector<std::unique_ptr<Cluster>>& resident) {
  std::ostringstream s;
  s << "deadlock in " << launch.kernel->name;
  int lines = 0;
  for (const auto& cluster : resident)
    for (const auto& cta : cluster->ctas)
      for (const Warp& w : cta->warps)
        for (const Fragment& f : w.fragments) {
          if (++lines > 24) continue;
          const Instr& i = launch.kernel->code[f.pc];
          s << "\n  block (" << cta->id[0] << ", " << cta->id[1] << ", " << cta->id[2] << ") warp " << w.index << " lanes 0x" << std::hex
            << f.mask << std::dec << ", line " << i.line << ": " << launch.kernel->text[f.pc]
            << (f.why ? std::string("  -- waits for ") + f.why : "");
        }
  throw Failure{s.str()};
}

uint64_t instruction_limit() {
  const char* setting = std::getenv("GPUSIM_LIMIT");
  return setting ? std::strtoull(setting, nullptr, 10) : 20'000'000'000ull;
}

}  // namespace

void Launch::run() {
  const uint32_t total = grid[0] * grid[1] * grid[2] / (cluster[0] * cluster[1] * cluster[2]);
  const uint32_t room = std::max<uint32_t>(1, static_cast<uint32_t>(sms * ctas_per_sm) / (cluster[0] * cluster[1] * cluster[2]));
  const uint64_t limit = instruction_limit();
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<Warp*> order;
  uint32_t next = 0;
  int idle = 0;
  while (next < total || !resident.empty()) {
    while (resident.size() < room && next < total) resident.push_back(make_cluster(*this, next++));
    const uint64_t before = progress;
    bool busy = false;
    order.clear();
    for (const auto& c : resident)
      for (const auto& cta : c->ctas)
        for (Warp& w : cta->warps)
          if (w.live) order.push_back(&w);
    if (random_schedule) std::shuffle(order.begin(), order.end(), random);
    for (Warp* w : order)
      if (w->live) busy |= w->run(random_schedule ? 1 + static_cast<int>(random() % 200) : 1024);
    for (const auto& c : resident) c->async->turn(!busy && progress == before);
    std::erase_if(resident, [&](const auto& c) {
      if (!c->done()) return false;
      c->async->finish();
      ++progress;
      return true;
    });
    idle = busy || progress != before ? 0 : idle + 1;
    if (idle > 8) report_deadlock(*this, resident);
    if (counters.instructions > limit) throw Failure{kernel->name + ": no end after " + std::to_string(limit) + " instructions"};
  }
}

}  // namespace gpusim
