// What a build without code for compute capability 9.0a links in place of the sm90 room.
#include "qgemm/sm90/room.h"

namespace flute::sm90 {

bool supports(const QgemmProblem&) { return false; }
int64_t workspace_bytes(const QgemmProblem&) { return 0; }
Status launch(const QgemmProblem&) { return {"this build of flute-kernels has no code for 9.0a."}; }

}  // namespace flute::sm90
