/// Runs hyper's tasks on the thread that they begin on.
#[derive(Clone, Copy, Debug)]
pub struct OnThread;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for OnThread {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}
